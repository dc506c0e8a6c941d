"""A recipe to begin with: sizes that fit a model and a machine, on public data.

Only the model's config is read. What is chosen here is a start; ``ccm train RECIPE --estimate`` measures it.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

from ..core.twin import text_config
from ..data.sources import source_class
from ..errors import ConfigError, StorageError, UnsupportedModelError
from ..models.load import DEFAULT_MODEL, bfloat16_units, load_config
from ..models.placement import is_gguf
from ..planning.sizes import Shape

#: Writings of a conversation, and how often each is drawn; those of an assistant have no names.
TALK = {
    "template": 3,
    "template-bare": 2,
    "template-system": 2,
    "names": 3,
    "roles": 2,
    "lines": 1,
    "script": 2,
}
HELP = {"template": 3, "template-bare": 2, "template-system": 2, "roles": 2}
#: The mixture of the recipes that are written here, each source with its options: that of recipes/one-gpu.yaml
#: with shorter rows, and without the ratings of films, which are for research only.
DATA: dict[str, dict[str, Any]] = {
    "chitchat": {"weight": 22, "turns": [10, 24, 64], "facts": 0.25, "echoes": 0.15, "formats": TALK},
    "film-dialogs": {"weight": 19, "turns": [12, 32, 64], "facts": 0.2, "echoes": 0.15, "formats": TALK},
    "errands": {"weight": 4, "turns": [8, 12, 16], "formats": HELP},
    "told": {"weight": 11, "told": [2, 4, 8, 12], "turns": [8, 16, 32, 64], "formats": TALK},
    "notes": {"weight": 4, "messages": [8, 16, 32]},
    "documents": {
        "weight": 10,
        "kinds": ["articles", "manuals", "how-to", "handbook"],
        "segment_tokens": [16, 192],
        "row_tokens": [512, 1024],
    },
    "books": {"weight": 6, "segment_tokens": [16, 192], "row_tokens": [512, 1024]},
    "code": {"weight": 4, "segment_tokens": [16, 192], "row_tokens": [512, 1024]},
    "icl": {"weight": 8, "demonstrations": [4, 8, 16], "relabel": 0.3},
    "lists": {"weight": 7, "lists": [1, 2, 4], "formats": HELP},
}
#: Options that say how long rows are, the shortest first.
LENGTHS = {"turns", "messages", "demonstrations", "row_tokens", "lists"}
#: What fetches packages of a registry.
CLIENTS = {"npm": "npm", "debian": "apt-get"}

#: Numbers that a pass keeps for each token and layer, as multiples of the model's two widths, on a processor and on
#: an accelerator: of the embedded model in bfloat16 1.7 and 0.6 MB a token (0.56 were measured there).
HIDDEN, FORWARD = (16, 9), (12, 3)
#: What is left of them where layers keep nothing.
CHECKPOINTED = 0.15
#: Tokens whose logits are made at once on a processor and on an accelerator, and bytes for each of their words.
LOGITS, WORD = (128, 2048), 12
#: Share of the free memory that a run is fitted to.
SHARE = 0.6
#: Tokens of a pass: fewest, and most on a processor and on an accelerator.
LEAST, MOST = 1024, (2048, 65536)
#: Parameters from which a model counts as large.
LARGE = 1_000_000_000
#: Contexts below this get the shortest rows of the data only.
SHORT = 2048


@dataclass(frozen=True)
class Machine:
    """Where a run will be.

    Attributes:
        device: "cpu", "cuda" or "mps".
        name: for people.
        memory: free bytes, of the device.
        bfloat16: whether it multiplies in bfloat16.
    """

    device: str
    name: str
    memory: int
    bfloat16: bool

    @classmethod
    def here(cls, device: torch.device) -> Machine:
        """This machine, as far as training on the device goes."""
        if device.type == "cuda":
            free = torch.cuda.mem_get_info(device)[0]
            name = torch.cuda.get_device_name(device)
            return cls("cuda", name, free, torch.cuda.is_bf16_supported(including_emulation=False))
        free = psutil.virtual_memory().available
        if device.type != "cpu":
            return cls(device.type, f"an accelerator ({device.type})", free, True)
        threads = torch.get_num_threads()
        return cls("cpu", f"{threads} CPU thread{'s' * (threads > 1)}", free, bool(bfloat16_units()))

    @property
    def there(self) -> bool:
        """Whether it is an accelerator."""
        return self.device != "cpu"


@dataclass(frozen=True)
class Fit:
    """Sizes of a run.

    Attributes:
        tokens: of a pass, padding counted.
        accumulate: passes of a step.
        checkpointing: whether layers keep nothing.
        bf16: whether the frozen model is in bfloat16.
        dtype: that the command has to name, because the weights are stored in another one; None for none.
        load_in: quantization of its layers, None for none.
        nbytes: what all this takes, by a rule of thumb.
    """

    tokens: int
    accumulate: int
    checkpointing: bool
    bf16: bool
    dtype: str | None
    load_in: str | None
    nbytes: int

    @property
    def options(self) -> str:
        """What a command that runs it has to say."""
        given = {"--dtype": self.dtype, "--load-in": self.load_in}
        return "".join(f" {name} {value}" for name, value in given.items() if value)


def fit(config: Any, machine: Machine, bf16: bool | None = None, load_in: str | None = None) -> Fit:
    """The largest pass that fits, with as little given up for it as possible.

    Args:
        config: of the model, from transformers.
        machine: where.
        bf16: whether the frozen model is in bfloat16; None takes what suits the machine.
        load_in: quantization that was asked for; None quantizes only where it has to be.

    Raises:
        ConfigError: it does not fit, whatever is given up.
        UnsupportedModelError: the model cannot carry a memory.
    """
    text = text_config(config)
    half = machine.bfloat16 if bf16 is None else bf16
    stored, config.dtype = config.dtype, torch.bfloat16 if half else torch.float32
    dtype = None if half or stored in (None, torch.float32) else "float32"
    context = Shape.of(config, load_in).context  # and, first of all, whether it can carry a memory
    wide = getattr(text, "intermediate_size", None)
    hidden, forward = HIDDEN[machine.there], FORWARD[machine.there]
    width = hidden * text.hidden_size + forward * (wide if isinstance(wide, int) else 4 * text.hidden_size)
    per_token = text.num_hidden_layers * width * config.dtype.itemsize
    logits = LOGITS[machine.there] * text.vocab_size * WORD
    most, room = MOST[machine.there], int(SHARE * machine.memory)
    if context < SHORT:
        most = min(most, context * 3 // 4)
    for quantized in dict.fromkeys((load_in, load_in or "4bit")):
        fixed = Shape.of(config, quantized).weight_bytes + logits
        for checkpointing in (False, True):
            cost = int(per_token * (CHECKPOINTED if checkpointing else 1))
            tokens = min(most, (room - fixed) // cost // 256 * 256)
            if tokens >= min(LEAST, most):
                step = most if machine.there else min(most, LEAST)
                accumulate = min(8, max(1, step // 2 // tokens))
                return Fit(tokens, accumulate, checkpointing, half, dtype, quantized, fixed + cost * tokens)
    needed = (fixed + cost * min(LEAST, most)) / SHARE
    raise ConfigError(
        f"too little memory on {machine.name}: {machine.memory / 1e9:.1f} GB are free, and a pass of {LEAST} tokens "
        f"takes about {needed / 1e9:.1f} GB even with layers in {load_in or '4bit'}; take a smaller model or another "
        "--device"
    )


def write_recipe(
    path: Path,
    model: str | None,
    machine: Machine,
    bf16: bool | None = None,
    load_in: str | None = None,
) -> Fit:
    """Write a recipe for a model.

    Args:
        path: a new file.
        model: folder, GGUF file or hub id; None is the embedded one.
        machine, bf16, load_in: as for :func:`fit`.

    Raises:
        ConfigError: no such model, or too little memory.
        UnsupportedModelError: the model cannot carry a memory.
        StorageError: the file is there already, or cannot be written.
    """
    config = load_config(model)
    if config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"--init writes recipes for decoders, and {model} is an encoder-decoder: docs/training.md has one"
        )
    chosen = fit(config, machine, bf16, load_in)
    if chosen.load_in and is_gguf(model):
        raise ConfigError(
            f"too little memory on {machine.name} for {model}, whose weights are read as floats"
        )
    text = recipe(path, model, config, machine, chosen)
    try:
        with path.open("x") as file:
            file.write(text)
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}; give another place with --out"
        ) from error
    return chosen


def recipe(path: Path, model: str | None, config: Any, machine: Machine, chosen: Fit) -> str:
    """The text of a recipe, to be read by :func:`~ccm.training.recipe.load_recipe`."""
    shape = Shape.of(config)
    large = shape.parameters >= LARGE
    option = chosen.options
    if machine.device == "cpu" and torch.accelerator.is_available():
        option += " --device cpu"
    there = machine.there
    slots, choices = (8, [1, 2, 4, 8]) if large and there else (4, [1, 2, 4, 4])
    notes = [
        f"An adapter for {model or DEFAULT_MODEL} ({shape.parameters / 1e6:,.0f} million parameters), written by",
        f"`ccm train --init` for {machine.name} with {machine.memory / 1e9:.0f} GB free.",
        "",
        f"    ccm train {path}{option} --estimate",
        f"    ccm train {path}{option} --out {Path('runs') / path.stem}",
        f"    ccm train {path}{option} --out {Path('runs') / path.stem} --extend",
    ]
    data, without = _data(shape.context)
    if to_fetch := _to_fetch(data):
        notes += ["", f"The first run fetches {to_fetch:,.0f} MB of public data."]
    notes += [f"Left out, for want of a program that fetches them: {', '.join(without)}."] if without else []
    lines: list[tuple[str, str]] = [
        (f"model: {_flow(model)}", "" if model else "the embedded one"),
        ("", ""),
        ("compressor:", ""),
        (f"  slots: {slots}", "keys and values that a segment leaves behind, at most"),
        ("  rule: concat", "mean: a memory that does not grow"),
        ("  sink: 4", "first tokens that stay"),
        (f"  rank: {16 if large else 8}", ""),
        (f"  alpha: {32 if large else 16}", ""),
        ("  target_modules: all", ""),
        ("", ""),
        ("data:", "weights are shares of the rows; yours: jsonl: {weight: 50, path: chats.jsonl}"),
        *((f"  {name}: {_flow(options)}", "") for name, options in data.items()),
        (f"data_workers: {2 if there else 0}", "processes that draw rows"),
        ("", ""),
        ("objective: distill", "from the model itself with the whole context"),
        ("recall_weight: 3", "what was told once counts more"),
        (f"slot_choices: {choices}", "one adapter for several budgets"),
        ("window_choices: [0, 0, 64]", "recent tokens beside the slots, in a third of the passes"),
        ("sink_choices: [0, 4, 4, 4]", "first tokens that stay"),
        ("resegment: 0.1", "share of the rows with other boundaries"),
        ("recut: 0.25", "share of the rows in pieces of one length, regardless of turns"),
        ("", ""),
        (f"minutes: {20 if there else 60}", "--extend goes on for as long again"),
        ("steps: 100000", "the clock ends it"),
        (f"rows: {400 if there else 8}", "of a pass, at most"),
        (f"tokens_per_batch: {chosen.tokens}", f"about {chosen.nbytes / 1e9:.1f} GB; --estimate measures it"),
        (f"accumulate: {chosen.accumulate}", "passes of a step"),
        (
            f"gradient_checkpointing: {_flow(chosen.checkpointing)}",
            "true: far less memory, a third more time",
        ),
        (f"bf16: {_flow(chosen.bf16)}", "the frozen model in bfloat16"),
        (f"lr: {5e-4 if large else 1e-3}", ""),
        (f"warmup: {30 if there else 10}", ""),
        ("", ""),
        ("eval_every: 100000", "at the end only"),
        (f"eval_rows: {24 if there else 8}", "of each source"),
        (f"save_every: {100 if there else 15}", ""),
    ]
    heading = [f"# {note}".rstrip() for note in notes]
    body = [f"{setting:<32}# {comment}" if comment else setting for setting, comment in lines]
    return "\n".join([*heading, "", *body, ""])


class _Plain(yaml.SafeDumper):
    """Writes what occurs twice out twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _flow(value: Any) -> str:
    """On one line."""
    text = yaml.dump(value, Dumper=_Plain, default_flow_style=True, sort_keys=False, width=10_000)
    return text.removesuffix("...\n").strip()


def _data(context: int) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The mixture with rows for a context, and sources that nothing here could fetch."""
    found = {name: options for name, options in DATA.items() if _can_fetch(name)}
    if context < SHORT:
        found = {name: _shortest(options) for name, options in found.items()}
    return found, sorted(DATA.keys() - found)


def _shortest(options: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value[:1] if name in LENGTHS and isinstance(value, list) else value
        for name, value in options.items()
    }


def _can_fetch(name: str) -> bool:
    source = source_class(name)
    clients = {CLIENTS[archive.registry] for archive in source.archives if archive.registry in CLIENTS}
    if source.downloaded() or not source.archives:
        return source.hub is None or importlib.util.find_spec("datasets") is not None
    return all(map(shutil.which, clients))


def _to_fetch(data: Mapping[str, Any]) -> float:
    archives = {archive for name in data for archive in source_class(name).archives}
    return sum(archive.megabytes for archive in archives if archive.locate() is None)

"""What a number of users needs, as figures that each say where they come from."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from ..chat.messages import Message
from ..errors import ConfigError
from ..methods import Method
from ..methods.default import checked
from ..models.load import load_config, random_model
from ..models.placement import AUTO, Placement, place
from ..serving import transcript
from ..serving.store import Limits
from . import measure
from .sizes import Held, Shape, after, check_fits, planned

#: Share of a GPU's memory that stays free for activations and fragmentation.
RESERVE = 0.1
#: Characters of English text per token, for the size of transcripts.
CHARACTERS = 4
#: Tokens of a turn and seconds between two answers of a user, where nothing is said.
TOKENS, PACE = 64, 60.0


@dataclass(frozen=True)
class Load:
    """What is planned for.

    Attributes:
        users: conversations.
        turns: of each; every second one is an answer.
        tokens_per_turn: with what the chat template adds; None assumes :data:`TOKENS`.
        pace: two answers of one user; None assumes :data:`PACE`.
    """

    users: int
    turns: int
    tokens_per_turn: int | None = None
    pace: float | None = None

    def __post_init__(self) -> None:
        for name in ("users", "turns", "tokens_per_turn", "pace"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name}: got {value}, expected more than 0")

    @property
    def tokens(self) -> int:
        """Of a turn: given, or assumed."""
        return self.tokens_per_turn or TOKENS

    @property
    def seconds(self) -> float:
        """Between two answers of a user: given, or assumed."""
        return self.pace or PACE

    @property
    def answers(self) -> int:
        """Of one conversation: every second turn is one."""
        return self.turns // 2


@dataclass(frozen=True)
class Figure:
    """One line of a plan.

    Attributes:
        name: for programs.
        text: for people.
        value: in ``unit``: "bytes", "tokens", "s", "1/s", "bytes/s", "x" (a factor) or "" (a count).
        origin: "given", "assumed", "calculated" or "measured"; what is calculated from a measured figure says so in
            its note.
        note: how.
    """

    name: str
    text: str
    value: float
    unit: str
    origin: str
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """A plan: titles and the figures below them."""

    model: str
    memory: str
    sections: dict[str, list[Figure]] = field(default_factory=dict)

    def __getitem__(self, name: str) -> float:
        """The value of a figure."""
        return next(f.value for figures in self.sections.values() for f in figures if f.name == name)


def plan(
    load: Load,
    *,
    model: str | None = None,
    device: str = AUTO,
    dtype: str = AUTO,
    load_in: str | None = None,
    memory: str | None = None,
    gpu_memory: int | None = None,
    store: str | None = None,
    measured: bool = True,
    tell: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Make a plan.

    Args:
        load: users and their conversations.
        model: as for ``load_model``; its config is enough.
        device, dtype, load_in: as for ``load_model``. What quantized layers take is calculated; they are not timed.
        memory: as it is written; an adapter may be one for another model. None is the best one for the model.
        gpu_memory: bytes; None takes those of the device, and leaves GPUs out where that is none.
        store: URL of a store to measure; None takes a temporary SQLite file.
        measured: whether to measure at all.
        tell: hears what is measured now.

    Raises:
        ConfigError: a model or adapter that is not there, a memory that would not fit the model's context, or a
            measurement that does not fit this machine.
        UnsupportedModelError: the model cannot carry a memory.
    """
    if store and not measured:
        raise ConfigError("a store is only measured: leave --store or --no-measure out")
    spec = checked(memory)
    where = place(model, dtype, device, load_in)
    model_config = load_config(model)
    model_config.dtype = where.dtype or model_config.dtype
    shape = Shape.of(model_config, load_in, where.device)
    method = planned(spec, random_model(model_config, "meta"))
    held = after(load.turns, load.tokens, method)
    check_fits(held, method, shape)
    raw = held.sink + held.window + method.means(held.folds)
    nbytes = held.slot_bytes(shape, torch.float16) + shape.kv_bytes(raw, torch.float16)
    sections = {
        "A conversation": list(_conversation(load, shape, held)),
        "GPUs": list(_gpus(load, shape, held, gpu_memory, where)),
        "Prefill": list(_prefill(load, method, held)),
        "Store": list(_store(load, held, nbytes)),
    }
    if measured:
        tell("measuring the store")
        sections["Store"] += _bandwidth(load, nbytes, measure.writing(store, nbytes))
    if measured and not load_in:
        # halfway through, where a memory that grows has its mean size
        tell("measuring folding and prefill")
        half = after(load.turns // 2, load.tokens, method)
        speed = measure.speed(model_config, shape, spec, half, load.tokens, where.device)
        sections["Prefill"] += _seconds(load, speed)
    return Plan(
        model or "the embedded model", f"{method.text}, segments of {method.longest} tokens at most", sections
    )


def _conversation(load: Load, shape: Shape, held: Held) -> Iterator[Figure]:
    tokens = load.turns * load.tokens
    full, kept = shape.kv_bytes(tokens), held.nbytes(shape)
    over = "" if tokens <= shape.context else f"more than the model's context of {shape.context}"
    yield Figure("users", "users", load.users, "", "given")
    yield Figure("turns", "turns of each", load.turns, "", "given")
    origin = "given" if load.tokens_per_turn else "assumed"
    yield Figure("tokens_per_turn", "tokens of a turn", load.tokens, "tokens", origin)
    yield Figure("tokens", "tokens of a conversation", tokens, "tokens", "calculated", over)
    yield Figure(
        "full_kv_bytes",
        "KV bytes of full context",
        full,
        "bytes",
        "calculated",
        "every layer holds every token",
    )
    how = "fp32" if held.method.width(shape.size) is None else "codes"
    held_note = f"{held.sink} sink, {held.slots} slots in {how}, {held.window} window"
    yield Figure("memory_kv_bytes", "KV bytes of the memory", kept, "bytes", "calculated", held_note)
    yield Figure("times_less", "times less", full / kept, "x", "calculated")


def _gpus(load: Load, shape: Shape, held: Held, gpu_memory: int | None, where: Placement) -> Iterator[Figure]:
    type_name = str(shape.dtype).removeprefix("torch.")
    yield Figure(
        "weight_bytes",
        "weights",
        shape.weight_bytes,
        "bytes",
        "calculated",
        f"{shape.parameters:,} in {type_name}" + (f", layers in {where.load_in}" if where.load_in else ""),
    )
    origin = "given"
    if gpu_memory is None and where.device.type == "cuda":
        gpu_memory, origin = torch.cuda.get_device_properties(where.device).total_memory, "measured"
    if gpu_memory is None:
        if shape.copy_bytes:
            note = "float16, beside the weights once an answer is written; none with --decode-in model"
            yield Figure("copy_bytes", "copy to decode from", shape.copy_bytes, "bytes", "calculated", note)
        return
    yield Figure("gpu_bytes", "memory of a GPU", gpu_memory, "bytes", origin)
    yield Figure("reserve", "of it kept free", RESERVE, "x", "assumed", "activations, fragmentation")
    room = int(gpu_memory * (1 - RESERVE)) - shape.weight_bytes
    if room <= 0:
        raise ConfigError(
            f"the weights take {shape.weight_bytes / 1e9:.1f} GB and a GPU of {gpu_memory / 1e9:.1f} GB has "
            f"{gpu_memory * (1 - RESERVE) / 1e9:.1f} to give: name one with more --gpu-memory"
        )
    for name, text, nbytes, note in (
        ("full", "full context", shape.kv_bytes(load.turns * load.tokens), ""),
        ("memory", "memories", shape.kv_bytes(held.length), f"{held.length} positions in {type_name}"),
    ):
        fit = room // nbytes
        yield Figure(f"users_per_gpu_{name}", f"users at once, {text}", fit, "", "calculated", note)
        if fit:
            gpus = math.ceil(load.users / fit)
            yield Figure(f"gpus_{name}", f"GPUs for all at once, {text}", gpus, "", "calculated")


def _prefill(load: Load, method: Method, held: Held) -> Iterator[Figure]:
    # answer k follows turn 2k-1
    full = load.tokens * load.answers**2
    read = load.tokens * load.turns + held.folds * method.behind
    yield Figure(
        "prefill_full",
        "read for full context",
        full,
        "tokens",
        "calculated",
        "all of it again for every answer",
    )
    yield Figure(
        "prefill_memory", "read for the memory", read, "tokens", "calculated", "COMP tokens included"
    )
    yield Figure("prefill_saved", "saved, a conversation", full - read, "tokens", "calculated")
    yield Figure("prefill_saved_all", "saved, all", (full - read) * load.users, "tokens", "calculated")


def _seconds(load: Load, speed: measure.Speed) -> Iterator[Figure]:
    tokens, answers = load.tokens * load.turns, max(load.answers, 1)
    full = load.tokens * load.answers**2 * speed.prefill / answers
    memory = tokens * speed.fold / answers
    where = f"on {speed.where}, random weights"
    yield Figure("prefill_seconds", "prefill of a token", speed.prefill, "s", "measured", where)
    yield Figure("fold_seconds", "reading and folding a token", speed.fold, "s", "measured", where)
    same = "a turn, read and folded, over a prefill of it behind the same memory"
    yield Figure("fold_share", "folding included, times a prefill", speed.share, "x", "measured", same)
    mean = "mean of a conversation, from the measured seconds"
    yield Figure("answer_seconds_full", "reading before an answer, full", full, "s", "calculated", mean)
    yield Figure("answer_seconds_memory", "reading for an answer, memory", memory, "s", "calculated", mean)
    if memory:
        most = math.floor(load.seconds / memory)
        note = f"one answer in {load.seconds:g} s each; writing answers comes on top"
        yield Figure(
            "users_per_machine", "users that this machine can read for", most, "", "calculated", note
        )


def _store(load: Load, held: Held, snapshot: int) -> Iterator[Figure]:
    keep = 2 * Limits().keep
    message = Message("assistant", "x" * CHARACTERS * load.tokens)
    entry = len(json.dumps(transcript.note(message, load.tokens, texts=True)))
    rate = load.users / load.seconds
    versions = min(keep, max(load.answers, 1))
    size = load.users * (versions * snapshot + load.turns * entry)
    yield Figure("versions", "versions kept", keep, "", "assumed", "ccm serve: newest, and far back")
    yield Figure(
        "snapshot_bytes", "a version", snapshot, "bytes", "calculated", "in fp16, running means in fp32"
    )
    yield Figure(
        "entry_bytes", "a turn's text", entry, "bytes", "assumed", f"{CHARACTERS} characters a token"
    )
    shared = "at the end, at most; versions share parts"
    yield Figure("store_bytes", "store, all users", size, "bytes", "calculated", shared)
    origin = "given" if load.pace else "assumed"
    yield Figure("pace", "between two answers of a user", load.seconds, "s", origin)
    yield Figure("commits", "commits", rate, "1/s", "calculated")
    written = rate * (snapshot + 2 * entry)
    yield Figure("written", "written to the store", written, "bytes/s", "calculated", "at the end, at most")
    yield Figure(
        "read", "read from the store", rate * snapshot, "bytes/s", "calculated", "at the end, at most"
    )


def _bandwidth(load: Load, nbytes: int, writing: measure.Writing) -> Iterator[Figure]:
    where = f"one after the other, to {writing.where}"
    yield Figure("commit_seconds", "a commit", writing.seconds, "s", "measured", where)
    yield Figure("bandwidth", "store, writing", nbytes / writing.seconds, "bytes/s", "measured", where)
    use = load.users / load.seconds * writing.seconds
    note = "from the measured commit; above 1 the store is too slow for one writer"
    yield Figure("store_use", "share of the store's time", use, "x", "calculated", note)

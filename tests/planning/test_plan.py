"""Plans against what real models, conversations and stores hold and read."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import transformers as hf
from tiny import BACKENDS, scramble, tiny_model, tiny_tokenizer
from transformers import PreTrainedModel

from ccm import cli, decoding
from ccm.core.compressor import Compressor, CompressorConfig
from ccm.core.live import Live
from ccm.errors import ConfigError, StorageError, UnsupportedModelError
from ccm.methods.hybrid import slots_and_matching
from ccm.methods.hybrid.slots_and_words import SlotsAndWords
from ccm.planning import measure
from ccm.planning.plan import Load, Plan, plan
from ccm.serving.settings import Settings
from ccm.serving.store import Usage, codec, open_store
from ccm.session import Session

CASES = [
    # family, dtype, adapter, slots, sink, window, turns, tokens of a turn
    ("llama", torch.float32, {"rule": "mean", "slots": 3}, None, 4, 64, 12, 20),
    ("llama", torch.float32, {"rule": "mean", "slots": 3}, 2, 0, 0, 3, 200),
    ("llama", torch.bfloat16, {"rule": "concat", "slots": 2}, None, 4, 64, 9, 37),
    ("gemma2", torch.float32, {"rule": "concat", "slots": 2}, 1, 3, 40, 7, 45),
    (
        "gpt_neox",
        torch.bfloat16,
        {"rule": "bounded", "rule_options": {"blocks": 3}, "slots": 2},
        None,
        2,
        16,
        10,
        11,
    ),
    ("qwen3", torch.float32, {"rule": "ema", "slots": 1}, None, 4, 64, 1, 10),  # nothing is folded yet
]


def base(family: str = "llama", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    backend = BACKENDS[family][0]
    settings = {"vocab_size": len(tiny_tokenizer()), "max_position_embeddings": 512}
    return tiny_model(family, backend, **settings).to(dtype)


def saved(
    folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **config: Any
) -> tuple[str, str]:
    """A tiny model and an adapter for it, as folders."""
    base(family, dtype).save_pretrained(folder / "model")
    compressor = Compressor(base(family, dtype), CompressorConfig(**config))
    scramble(compressor).save_pretrained(folder / "adapter")
    return str(folder / "model"), str(folder / "adapter")


@pytest.mark.parametrize(("family", "dtype", "config", "slots", "sink", "window", "turns", "tokens"), CASES)
def test_figures_are_what_a_real_conversation_has(
    tmp_path, family, dtype, config, slots, sink, window, turns, tokens
):
    folders = saved(tmp_path, family, dtype, **config)
    made = plan(
        Load(7, turns, tokens),
        model=folders[0],
        memory=f"{folders[1]}:slots={slots or config['slots']},sink={sink},window={window}",
        gpu_memory=10**7,
        measured=False,
    )
    model = base(family, dtype)
    compressor = Compressor.from_pretrained(model, folders[1])
    read = []
    compressor.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    session = Session(compressor, tiny_tokenizer(), slots=slots, sink=sink, window=window)
    for turn in range(turns):
        ids = tuple((turn * tokens + i) % 90 + 3 for i in range(tokens))
        session.memory = session._folded(session.memory, ids)

    stats = session.stats()
    assert made["memory_kv_bytes"] == stats["nbytes"] == session.memory.nbytes
    assert made["full_kv_bytes"] == stats["full_context_nbytes"]
    assert made["prefill_memory"] == sum(read)
    held = next(f for f in made.sections["A conversation"] if f.name == "memory_kv_bytes").note
    assert held == f"{stats['sink']} sink, {stats['slots']} slots in fp32, {stats['window']} window"

    cache = Live.over(session.memory, compressor.rotary, dtype).cache
    nbytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    weights = sum(p.nbytes for name, p in model.named_parameters() if "lora_" not in name)
    assert made["weight_bytes"] == weights
    assert made["users_per_gpu_memory"] == (int(0.9 * 10**7) - weights) // nbytes
    assert made["users_per_gpu_full"] == (int(0.9 * 10**7) - weights) // stats["full_context_nbytes"]

    means = [session.method.means(row.steps) for row in session.memory.rows]
    payload, kept = codec.encode(session.memory, Settings("any").precision, means)
    assert kept["dtype"] == "float16"
    assert 0 < len(payload) - made["snapshot_bytes"] < 8192  # the header, which does not grow


@pytest.mark.parametrize("memory", ["snapkv:tokens=9,window=20", "retrieve", "full", "mean-pool", None])
def test_every_memory_can_be_planned(tmp_path, memory):
    model = base()
    model.save_pretrained(tmp_path)
    made = plan(Load(3, 7, 20), model=str(tmp_path), memory=memory)
    session = Session.open(model, tiny_tokenizer(), memory)
    for turn in range(7):
        ids = tuple((turn * 20 + i) % 90 + 3 for i in range(20))
        session.memory = session._folded(session.memory, ids)
    assert made["memory_kv_bytes"] == session.memory.nbytes
    assert made["fold_seconds"] > 0 and made.memory.startswith(session.method.name)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[str, str]:
    """A model without weights, and an adapter without weights."""
    folder = tmp_path_factory.mktemp("plan")
    model, adapter = saved(folder, rule="mean", slots=2)
    for path in [*Path(model).glob("*.safetensors"), *Path(adapter).glob("*.safetensors")]:
        path.unlink()
    return model, adapter


def test_prefill_of_full_context_is_the_history_before_every_answer(folders):
    made = plan(Load(5, 9, 10), model=folders[0], memory=folders[1], measured=False)
    reads = [turn * 10 for turn in range(1, 9, 2)]  # before turns 2, 4, 6, 8
    assert made["prefill_full"] == sum(reads)
    assert made["prefill_saved"] == sum(reads) - made["prefill_memory"]
    assert made["prefill_saved_all"] == 5 * made["prefill_saved"]


def test_a_config_is_enough_and_every_figure_says_where_it_comes_from(folders, capsys, caplog):
    where = ["--model", folders[0], "--adapter", folders[1]]
    assert cli.main(["plan", *where, "--users", "10", "--turns", "6", "--gpu-memory", "0.01", "--json"]) == 0
    out, _ = capsys.readouterr()
    figures = {f["name"]: f for section in json.loads(out)["sections"].values() for f in section}
    origins = {name: figure["origin"] for name, figure in figures.items()}
    assert set(origins.values()) == {"given", "assumed", "calculated", "measured"}
    measured = {name for name, origin in origins.items() if origin == "measured"}
    assert measured == {"prefill_seconds", "fold_seconds", "fold_share", "commit_seconds", "bandwidth"}
    assert all(figures[name]["value"] > 0 for name in measured)
    assert "noise" not in caplog.text  # the weights are random, as they may be here
    assert (origins["tokens_per_turn"], origins["pace"], origins["gpu_bytes"]) == (
        "assumed",
        "assumed",
        "given",
    )

    quick = ["plan", *where, "--users", "10", "--turns", "6", "--no-measure", "--tokens-per-turn", "9"]
    assert cli.main([*quick, "--json"]) == 0
    figures = {f["name"]: f for s in json.loads(capsys.readouterr().out)["sections"].values() for f in s}
    assert not measured & set(figures) and figures["tokens_per_turn"]["origin"] == "given"
    assert cli.main(quick) == 0
    assert "KV bytes of the memory" in capsys.readouterr().out


def test_the_store_that_is_measured_is_left_as_it_was(folders, tmp_path):
    url = f"sqlite://{tmp_path}/m.db"
    made = plan(Load(1, 2, 5), model=folders[0], memory=folders[1], store=url)
    assert isinstance(made, Plan) and made["bandwidth"] > 0
    with open_store(url) as store:
        assert store.usage("ccm-plan") == Usage(0, 0)


#: What `8b` on the page is: the shape of Llama 3.1 8B.
CONFIG = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "dtype": "bfloat16",
}


@pytest.mark.slow  # the embedded model
def test_the_page_shows_what_is_printed(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs" / "planning.md").read_text()
    shown = re.findall(r"```console\n\$ ccm (.*)\n((?:.|\n)*?)```", page)
    assert len(shown) == 2
    (tmp_path / "8b").mkdir()
    (tmp_path / "8b" / "config.json").write_text(json.dumps(CONFIG))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    for command, output in shown:
        assert cli.main(shlex.split(command)) == 0
        assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == output.splitlines()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_copy_that_answers_are_decoded_from_is_counted(tmp_path, monkeypatch, dtype):
    """What is packed when such a model first decodes; nothing on a GPU, and nothing of a large one."""
    folders = saved(tmp_path, "llama", dtype, rule="mean", slots=2)
    sizes: list[int] = []
    own = decoding.products.packed

    def packed(weight: torch.Tensor, *rest: Any) -> Any:
        sizes.append(2 * len(weight) * 512)  # of fewer columns than 512
        return own(weight, *rest)

    monkeypatch.setattr("ccm.decoding.products.packed", packed)
    with torch.no_grad():
        decoding.Step(base("llama", dtype), "float16")
    copied, options = sum(sizes), {"model": folders[0], "memory": folders[1], "measured": False}
    made = plan(Load(1, 6), **options)
    assert made["copy_bytes"] == copied > made["weight_bytes"] / dtype.itemsize
    (figure,) = (f for f in made.sections["GPUs"] if f.name == "copy_bytes")
    assert figure.origin == "calculated" and "--decode-in" in figure.note

    def names(**more: Any) -> set[str]:
        return {f.name for f in plan(Load(1, 6), **{**options, **more}).sections["GPUs"]}

    assert "copy_bytes" not in names(gpu_memory=10**7)
    assert "copy_bytes" not in names(dtype="float16")
    monkeypatch.setattr("ccm.planning.sizes.SMALL", 1000)
    assert "copy_bytes" not in names()


def test_help_has_an_example(capsys):
    assert cli.main(["plan", "--help"]) == 0
    assert "Example: ccm plan" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--users", "0"], "--users"),
        (["--turns", "-1"], "--turns"),
        (["--pace", "0"], "pace"),
        (["--pace", "nan"], "pace"),
        (["--adapter", "no/where"], "no adapter"),
        (["--memory", "none"], "nothing to plan"),
        (["--memory", "snapkv:token=3"], "did you mean tokens?"),
        (["--memory", "full", "--turns", "10000"], "fewer --turns"),
        (["--adapter", "gisting"], "whole history"),
        (["--model", "nowhere"], "no model 'nowhere'"),
        (["--adapter", "ccm-concat", "--turns", "10000"], "fewer --turns"),
        (["--gpu-memory", "0.0001"], "--gpu-memory"),
        (["--store", "sqlite:x"], "--no-measure"),
    ],
)
def test_bad_input_is_one_line(folders, options, says, capsys):
    given = ["--model", folders[0], "--users", "2", "--turns", "2", "--no-measure"]
    assert cli.main(["plan", *given, *options]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ") and says in err


@pytest.mark.parametrize(("tokens", "passes"), [(20, 1), (90, 1), (400, 1)])
def test_a_turn_is_timed_with_the_passes_that_a_server_makes(folders, monkeypatch, tokens, passes):
    """All of its segments in one pass, not one pass or two for each of them."""
    counts: list[int] = []
    times = measure._times

    def counted(device: Any, *calls: Any) -> Any:
        for call in calls:
            read: list[Any] = []
            hook = torch.nn.modules.module.register_module_forward_pre_hook(
                lambda module, args, read=read: (
                    read.append(module) if type(module).__name__ == "LlamaModel" else None
                )
            )
            call()
            hook.remove()
            counts.append(len(read))
        return times(device, *calls)

    monkeypatch.setattr(measure, "_times", counted)
    made = plan(Load(1, 6, tokens), model=folders[0], memory=f"{folders[1]}:window=16")
    assert counts == [1, passes, 1] and made["fold_share"] > 0


def test_a_store_that_is_not_there_is_said_before_the_model_is_measured(folders, monkeypatch):
    monkeypatch.setattr(measure, "speed", lambda *args: pytest.fail("measured first"))
    with pytest.raises(StorageError):
        plan(Load(1, 2, 5), model=folders[0], memory=folders[1], store="redis://127.0.0.1:1/0")


def test_a_model_that_does_not_fit_here_is_planned_without_measuring(folders, monkeypatch):
    nothing = type("Memory", (), {"available": 10_000})
    monkeypatch.setattr(psutil, "virtual_memory", nothing)
    with pytest.raises(ConfigError, match="--no-measure"):
        plan(Load(1, 2, 5), model=folders[0], memory=folders[1])
    assert plan(Load(1, 2, 5), model=folders[0], memory=folders[1], measured=False)["users"] == 1


def test_families_that_cannot_carry_a_memory_are_refused(tmp_path):
    hf.GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=20).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="gpt2"):
        plan(Load(1, 2), model=str(tmp_path), measured=False)


@pytest.mark.parametrize("of", ["attention-matching", "adapter"])
def test_codes_are_planned_as_they_are_held(of: str, tmp_path: Path) -> None:
    folders = saved(tmp_path, rule="concat", slots=2)
    of = folders[1] if of == "adapter" else of
    memory = f"packed:of={of},code=int4,sink=2,window=16"
    made = plan(Load(7, 9, 20), model=folders[0], memory=memory, gpu_memory=10**7, measured=False)
    session = Session.open(base(), tiny_tokenizer(), memory=memory)
    for turn in range(9):
        session.memory = session._folded(session.memory, tuple((turn * 20 + i) % 90 + 3 for i in range(20)))
    stats = session.stats()
    assert made["memory_kv_bytes"] == stats["nbytes"] == session.memory.nbytes
    held = next(f for f in made.sections["A conversation"] if f.name == "memory_kv_bytes").note
    assert held == f"{stats['sink']} sink, {stats['slots']} slots in codes, {stats['window']} window"
    data, _ = codec.encode(session.memory, "float16")
    header = int.from_bytes(data[:8], "little") + 8
    assert made["snapshot_bytes"] == len(data) - header


@pytest.mark.parametrize("turns", [2, 30])
@pytest.mark.parametrize("of", ["slots-and-matching", "slots-and-words"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_hybrid_is_planned_as_it_is_held_and_timed_with_all_that_it_does(
    of: str, packed: bool, turns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is fitted is fitted while it is timed, and words are read."""
    folders = saved(tmp_path, rule="concat", slots=2)
    options = {"adapter": folders[1], "slots": 1, "sink": 2, "window": 24}
    options |= {"fitted": 16} if of == "slots-and-matching" else {"words": 2}
    written = ",".join(f"{'options.' if packed else ''}{name}={value}" for name, value in options.items())
    memory = f"packed:of={of},code=int4,{written}" if packed else f"{of}:{written}"
    worked: list[int] = []
    fit, read = slots_and_matching.match, SlotsAndWords._chosen
    monkeypatch.setattr(slots_and_matching, "match", lambda *args: worked.append(args[3]) or fit(*args))
    monkeypatch.setattr(SlotsAndWords, "_chosen", lambda *args: worked.append(args[-1]) or read(*args))
    made = plan(Load(7, turns, 20), model=folders[0], memory=memory, gpu_memory=10**7)
    session = Session.open(base(), tiny_tokenizer(), memory=memory)
    timed, worked[:] = set(worked), []
    for turn in range(turns):
        if turn == turns // 2 + 1:
            assert timed == set(worked[-1:])
        session.memory = session._folded(session.memory, tuple((turn * 20 + i) % 90 + 3 for i in range(20)))
    assert made["memory_kv_bytes"] == session.memory.nbytes

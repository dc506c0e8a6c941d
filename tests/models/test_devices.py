"""Where a model runs, in which type, and what may move between."""

from __future__ import annotations

import asyncio
import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from gguf_files import write_gguf
from pretend import Pretend, pretended_devices
from safetensors.torch import load_file, save_file
from tiny import pad, random_rows, saved_folder, scramble, tiny_compressor, tiny_model, tiny_tokenizer

import ccm
from ccm import cli
from ccm.cli import checks as doctor
from ccm.core.compressor import Compressor, CompressorConfig
from ccm.core.memory import Memory
from ccm.errors import CCMError, ConfigError, MissingPackageError, UnsupportedModelError
from ccm.methods import as_method
from ccm.methods.baselines import BASELINES
from ccm.models import placement
from ccm.models.options import Loading
from ccm.models.placement import place
from ccm.planning.plan import Load, plan
from ccm.serving.engine import PaddedEngine
from ccm.serving.engine.padded import run
from ccm.serving.service import Service, Settings
from ccm.serving.store import open_store
from ccm.session import Session

CPU = torch.device("cpu")
HERE = torch.accelerator.is_available()


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes this a machine with two graphics cards, as far as torch is asked what there is."""

    def make(kind: str = "cuda", bfloat16: bool = True) -> None:
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bfloat16)
        monkeypatch.setattr(placement, "_can", lambda device, dtype: bfloat16 or dtype != torch.bfloat16)

    return make


# ---------------------------------------------------------------------- what is chosen


@pytest.mark.skipif(HERE, reason="there is an accelerator here")
def test_without_an_accelerator_all_is_left_on_the_cpu_as_it_is():
    assert place().device == place(None, None, None).device == CPU
    assert place().dtype is None
    for stored in (torch.float32, torch.bfloat16):
        assert place().dtype_of(stored) is stored
    assert place().dtype_of(torch.float16) is torch.float32  # slow there
    assert place(None, None, None).dtype_of(torch.float16) is torch.float16  # as ever in Python
    assert place(None, "float16").dtype_of(torch.float32) is torch.float16  # who asks for it gets it


@pytest.mark.parametrize(
    ("kind", "bfloat16", "expected"),
    [
        ("cuda", True, torch.bfloat16),
        ("cuda", False, torch.float16),
        ("mps", True, torch.bfloat16),
        ("mps", False, torch.float16),
    ],
)
def test_an_accelerator_is_taken_with_the_type_that_suits_it(cards, kind, bfloat16, expected):
    cards(kind, bfloat16)
    taken = place()
    assert (taken.device, taken.dtype) == (torch.device(kind), expected)
    assert place(None, None, None).device == CPU  # in Python nothing moves unasked
    assert place(None, None, None).dtype is None
    assert place(None, "auto", "cpu").dtype is None
    assert place(None, None, f"{kind}:1").device == torch.device(kind, 1)
    assert place(None, "float32").dtype is torch.float32


def test_a_checkpoint_keeps_its_type_but_float16(tmp_path):
    for dtype, auto in ((torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float16, torch.float32)):
        folder = saved_folder(tmp_path / str(dtype), dtype=dtype)
        assert ccm.load_model(folder)[0].dtype is dtype
        model, _ = ccm.load_model(folder, "auto", "cpu")
        assert model.dtype is auto
        assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert ccm.load_model(folder, "bfloat16")[0].dtype is ccm.load_model(folder, torch.bfloat16)[0].dtype


# ---------------------------------------------------------------------- what cannot be

MISTAKES = [
    (["--device", "abacus"], "device 'abacus': no such device"),
    (["--device", "mps"], "device 'mps' is not there: here it is auto, cpu or cuda"),
    (["--device", "cuda:2"], "device 'cuda:2' is not there: this machine has 2, counted from 0"),
    (["--dtype", "int4"], "unknown type of weights 'int4': expected one of auto, bfloat16, float16, float32"),
    (["--dtype", "bfloat16"], "dtype bfloat16: device cuda cannot do it"),
    (
        ["--load-in", "3bit"],
        "unknown kind of quantized weights '3bit' (did you mean 8bit?): expected one of 4bit, 8bit",
    ),
    (["--load-in", "4bit"], "needs bitsandbytes: pip install 'compressed-context-memory[quant]'"),
    (["--load-in", "8bit"], "needs torchao: pip install 'compressed-context-memory[quant]'"),
    (["--load-in", "8bit", "--model", "{gguf}"], "its weights were rounded once"),
    (["--model", "nothing.gguf"], "no file 'nothing.gguf': expected a GGUF file of this name"),
    (["--device", "cuda", "--device-map", "auto"], "device 'cuda' with a device map"),
    (["--device-map", "everywhere"], "unknown device map 'everywhere'"),
]


@pytest.mark.parametrize(
    "command", ["chat", "demo", "serve --port 0", "eval quick", "train {recipe}", "plan"]
)
def test_what_cannot_be_is_one_line_before_anything_is_loaded(command, cards, monkeypatch, tmp_path, capsys):
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("something was loaded")

    cards(bfloat16=False)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in placement.LOAD_IN.values() else find(name)
    )
    (tmp_path / "a.gguf").touch()
    (tmp_path / "recipe.yaml").write_text("bf16: false\n")
    for name in ("AutoModelForCausalLM", "AutoTokenizer", "AutoConfig"):
        monkeypatch.setattr(f"ccm.models.load.{name}", never)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    words = [word.format(recipe=tmp_path / "recipe.yaml") for word in command.split()]
    tried = 0
    for options, message in MISTAKES:
        given = [option.format(gguf=tmp_path / "a.gguf") for option in options]
        if (
            words[0] == "train" and "rounded once" in message
        ):  # options are looked at before the recipe is read
            message = "needs torchao"
        if words[0] == "train" and "--model" in given:  # it is a key of the recipe
            given[given.index("--model") : given.index("--model") + 2] = [f"model={given[-1]}"]
        if words[0] == "plan":
            if "--device-map" in given:  # nothing is loaded
                continue
            given += ["--users", "1", "--turns", "1"]
        assert cli.main([*words, *given]) == 2, options
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and len(err.splitlines()) == 1, err
        assert message in err
        tried += 1
    assert tried >= 10


def test_training_takes_two_types(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("model: nowhere\n")
    assert cli.main(["train", str(tmp_path / "recipe.yaml"), "--dtype", "float16"]) == 2
    assert "train in bfloat16 or float32" in capsys.readouterr().err
    for dtype, bf16 in (("float32", "false"), ("bfloat16", "true")):
        assert cli.main(["train", str(tmp_path / "recipe.yaml"), "--dtype", dtype, "--show"]) == 0
        assert f"bf16: {bf16}" in capsys.readouterr().out


def test_doctor_says_what_would_be_taken(cards, monkeypatch):
    found = {check.name: check for check in doctor.checks()}
    if not HERE:
        assert found["models run"].found == "on cpu, in the checkpoint's type"
    cards()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "A card")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (7 * 10**9, 8 * 10**9))
    found = {check.name: check for check in doctor.checks()}
    assert found["GPU"].found == "A card, 7.0 GB free"
    assert found["models run"].found == "on cuda, in bfloat16"


# ---------------------------------------------------------------------- GGUF files


def test_a_gguf_file_is_the_model_that_it_was_made_from(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["ab"])  # what the file's only merge makes
    model = tiny_model(vocab_size=len(tokenizer))
    write_gguf(tmp_path / "tiny.gguf", model, tokenizer)
    loaded, words = ccm.load_model(str(tmp_path / "tiny.gguf"))
    ids = torch.tensor(random_rows([[20]])[0])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.dtype == torch.float32 and not loaded.training
    messages = [{"role": "user", "content": "hé there<|im_end|>"}]
    assert words.apply_chat_template(messages, tokenize=False) == tokenizer.apply_chat_template(
        messages, tokenize=False
    )
    assert words.encode("hé there<|im_end|>") == tokenizer.encode("hé there<|im_end|>")
    assert ccm.load_model(str(tmp_path / "tiny.gguf"), "bfloat16")[0].dtype == torch.bfloat16
    session = Session(scramble(Compressor(loaded, CompressorConfig(slots=2))), words)
    session.generate("hello", max_new_tokens=3)
    with pytest.raises(UnsupportedModelError, match="not a GGUF file"):
        (tmp_path / "other.gguf").write_bytes(b"something else")
        ccm.load_model(str(tmp_path / "other.gguf"))


def test_a_plan_reads_a_gguf_file(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["ab"])
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=512)
    write_gguf(tmp_path / "tiny.gguf", model, tokenizer)
    made = plan(Load(1, 4, 8), model=str(tmp_path / "tiny.gguf"), measured=False)
    assert made["weight_bytes"] == 4 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("wrong", "weights", "said"),
    [
        ({"intermediate_size": 40}, {}, "mlp.down_proj.weight is (32, 48), not (32, 40), and 8 more"),
        ({"num_hidden_layers": 4}, {}, "model.layers.3.input_layernorm.weight is missing, and 8 more"),
        ({}, {"model.norm.weight": None}, "(model.norm.weight is missing)"),
        ({}, {"model.norm.weight": torch.ones(3)}, "(model.norm.weight is (3,), not (32,))"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, dtype, wrong, weights, said):
    """transformers fills gaps with random weights, and says so in a log that the command line does not show."""
    folder = saved_folder(tmp_path / "model", dtype)
    config, file = tmp_path / "model" / "config.json", tmp_path / "model" / "model.safetensors"
    config.write_text(json.dumps(json.loads(config.read_text()) | wrong))
    kept = {name: weight for name, weight in (load_file(file) | weights).items() if weight is not None}
    save_file(kept, file, {"format": "pt"})
    with pytest.raises(ConfigError, match="do not fit its config") as error:
        ccm.load_model(folder)
    assert said in str(error.value) and "report" not in str(error.value)


def test_what_is_quantized_already_is_not_quantized_again(tmp_path, monkeypatch):
    folder = saved_folder(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    quantized = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "quantization_config": quantized}))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(ConfigError, match="quantized already: leave out 4bit"):
        ccm.load_model(folder, load_in="4bit")


# ---------------------------------------------------------------------- several devices

#: Two layers on another card than the embeddings.
TWO = {"embed_tokens": 0, "rotary_emb": 0, "layers.0": 0, "layers.1": 1, "layers.2": 1, "norm": 1}
SPREADS = [
    ("llama", {}, {}),
    ("llama", {}, {"rule": "mean"}),
    ("mistral", {}, {}),
    ("gemma2", {"backend": "eager"}, {"rule": "ema"}),
    ("qwen3", {}, {"kind": "autocompressor"}),
    ("llama", {}, {"kind": "compressive"}),
]


def spread(model: Any) -> Any:
    """The model on two pretended cards."""
    places = {f"model.{name}": f"xla:{card}" for name, card in TWO.items()}
    head = "xla:0" if model.config.tie_word_embeddings else "xla:1"
    return dispatch_model(model, {**places, "lm_head": head}, main_device="xla:0")


def answers(compressor: Compressor, **sizes: int) -> list[torch.Tensor]:
    """Logits over a memory, one by one and in parallel, what is generated, and rows of the server."""
    rows, memory = random_rows([[7, 5, 6], [4, 9, 5]]), None
    for segment in zip(*rows, strict=True):
        ids, mask = pad(segment)
        logits = compressor.logits(ids, memory, mask)
        memory = compressor.compress(ids, memory, mask, **sizes)
    device = compressor.model.device
    parallel = compressor(rows, **sizes).logits
    new = compressor.generate([rows[0][0]], memory[0], max_new_tokens=5, do_sample=False)
    batch, served = run(compressor, compressor.live(memory), torch.tensor([[5, 6], [7, 8]], device=device))
    _, later = run(compressor, batch.select([1]), torch.tensor([[9]], device=device))
    assert {tensor.device for tensor in (logits, parallel, new, served, later)} == {device}
    return [logits, parallel, new, served, later]


@pytest.mark.parametrize(("family", "options", "config"), SPREADS)
def test_a_model_on_two_cards_answers_as_on_one(family, options, config):
    sizes = {} if config.get("kind") else {"sink": 2, "window": 6}
    settings = CompressorConfig(**{"slots": 2, **config})
    made_by = BASELINES.get(settings.kind, Compressor)
    model = tiny_model(family, **options)
    expected = answers(scramble(made_by(model, settings)), **sizes)
    with pretended_devices():
        compressor = scramble(made_by(spread(tiny_model(family, **options)), settings))
        assert [str(device) for device in compressor.devices] == ["xla:0", "xla:1", "xla:1"]
        for mine, right in zip(answers(compressor, **sizes), expected, strict=True):
            assert isinstance(mine, Pretend)
            torch.testing.assert_close(mine.inner, right, atol=1e-4, rtol=1e-4)


def test_cards_that_do_not_know_of_each_other_would_be_seen():
    """The control: with all of a memory on the first card, its tensors meet others on the second."""
    with pretended_devices():
        compressor = scramble(Compressor(spread(tiny_model()), CompressorConfig(slots=2)))
        compressor.devices = []
        memory = compressor.compress([[5, 6, 7]])
        with pytest.raises(RuntimeError, match=r"same device|on one device"):
            compressor.logits([[8, 9]], memory)


def test_a_session_runs_on_one_card(tmp_path):
    """Nothing is left behind on the CPU; a memory that was saved there goes on here."""
    tokenizer = tiny_tokenizer()
    shape = {"vocab_size": len(tokenizer), "max_position_embeddings": 512}

    def talk(session):
        return [session.generate(text, max_new_tokens=6, do_sample=False) for text in ("red", "blue", "sun")]

    sizes = {"sink": 2, "window": 16}
    session = Session(tiny_compressor(model=shape), tokenizer, **sizes)
    expected = talk(session)
    session.save(tmp_path / "there.ccm")
    last = session.generate("moon", max_new_tokens=6, do_sample=False)
    with pretended_devices():
        settings = CompressorConfig(slots=2)
        compressor = scramble(Compressor(tiny_model(**shape).to("xla:0"), settings))
        assert talk(Session(compressor, tokenizer, **sizes)) == expected
        session = Session.load(tmp_path / "there.ccm", compressor, tokenizer)
        assert session.memory.rows[0].slots.keys.device == torch.device("xla:0")
        assert session.generate("moon", max_new_tokens=6, do_sample=False) == last


def test_layers_that_wait_on_the_disk_fold_as_in_memory(tmp_path):
    folder = saved_folder(tmp_path / "model")
    compressor = scramble(Compressor(ccm.load_model(folder)[0], CompressorConfig(slots=2)))
    compressor.save_pretrained(tmp_path / "adapter")
    adapted = Compressor.from_pretrained(ccm.load_model(folder)[0], tmp_path / "adapter")
    places = {f"model.{name}": "disk" if name == "layers.1" else "cpu" for name in TWO}
    model, _ = ccm.load_model(folder, device_map={**places, "lm_head": "cpu"})
    assert next(model.model.layers[1].parameters()).is_meta
    loaded = Compressor.from_pretrained(model, tmp_path / "adapter")
    assert loaded.fingerprint() == adapted.fingerprint()
    with torch.no_grad():
        for mine, right in zip(
            answers(loaded, sink=2, window=6), answers(adapted, sink=2, window=6), strict=True
        ):
            torch.testing.assert_close(mine, right, atol=1e-5, rtol=1e-5)
    loaded(random_rows([[7, 5, 6]])).loss.backward()
    assert all(p.grad is not None for p in loaded.trainable_parameters())
    with pytest.raises(ConfigError, match="embeddings on no device"):
        places["model.embed_tokens"] = "disk"
        Compressor(ccm.load_model(folder, device_map={**places, "lm_head": "cpu"})[0])


def test_auto_spreads_a_model_over_what_there_is(tmp_path):
    folder = saved_folder(tmp_path / "model")
    model, _ = Loading(folder, device_map="auto").load()
    expected, _ = ccm.load_model(folder)
    ids = torch.tensor(random_rows([[9]])[0], device=model.device)
    with torch.no_grad():
        assert torch.allclose(model(ids).logits.float().cpu(), expected(ids.cpu()).logits, atol=0.2)


# ---------------------------------------------------------------------- memories move


@pytest.fixture(scope="module")
def pair() -> tuple[Compressor, Compressor]:
    """One model and adapter in float32 and in bfloat16."""
    shape = {"vocab_size": len(tiny_tokenizer()), "max_position_embeddings": 512}
    config = CompressorConfig(slots=2)
    both = [scramble(Compressor(tiny_model(**shape).to(t), config)) for t in (torch.float32, torch.bfloat16)]
    with torch.no_grad():
        both[1].comp_embeddings.copy_(both[0].comp_embeddings)
    return both[0], both[1]


def raw(memory: Memory) -> set[torch.dtype]:
    return {kv.keys.dtype for row in memory.rows for kv in (row.sink, row.window)}


def test_a_memory_goes_to_another_type_and_back(pair, tmp_path):
    exact, short = pair
    assert exact.fingerprint() == short.fingerprint()
    made = exact.compress([[5] * 12], window=4, sink=2)
    made = exact.compress([[7] * 4], made, window=4, sink=2)
    made.save(tmp_path / "a.ccm")
    for compressor in (short, exact, short):
        memory, _ = Memory.load(tmp_path / "a.ccm")
        more = compressor.compress([[9] * 4], memory, window=8, sink=2)
        assert raw(more) == {compressor.model.dtype}
        assert more.rows[0].slots.keys.dtype == torch.float32
        logits = compressor.logits([[5, 6]], memory)
        assert logits.dtype == compressor.model.dtype and torch.isfinite(logits).all()
        more.save(tmp_path / "a.ccm")
    back = made.to("cpu", torch.bfloat16).to("cpu", torch.float32)
    (old,), (new,) = made.rows, back.rows
    assert torch.equal(new.slots.keys, old.slots.keys)  # slots are exact in every type
    assert torch.equal(new.window.values, old.window.values.bfloat16().float())
    assert made.to("cpu", torch.float32) is made


def test_a_session_goes_on_in_another_type(pair, tmp_path):
    tokenizer = tiny_tokenizer()
    for here, there in (pair, pair[::-1]):
        session = Session(here, tokenizer, sink=2, window=16)
        session.append("red green blue")
        session.save(tmp_path / "s.ccm")
        other = Session.load(tmp_path / "s.ccm", there, tokenizer)
        assert raw(other.memory) == {there.model.dtype}
        assert other.stats()["tokens_seen"] == session.stats()["tokens_seen"]
        other.generate("sun", max_new_tokens=3, do_sample=False)
        assert raw(other.memory) == {there.model.dtype}


def test_the_server_takes_memories_of_another_type(pair, tmp_path):
    tokenizer = tiny_tokenizer()

    def serve(compressor: Compressor) -> Service:
        store = open_store(f"sqlite://{tmp_path}/memories.db")
        method = as_method(compressor, tokenizer, slots=2, sink=2, window=16, segment=8)
        return Service(method, tokenizer, store, Settings("tiny"), PaddedEngine(method, tokenizer))

    async def run() -> None:
        from ccm.serving.service import Message, Sampling

        said = [Message("user", "red green blue")]
        greedy = Sampling(max_tokens=4, temperature=0)
        first = serve(pair[0])
        await (await first.answer("t", "a", said, greedy, create=True)).finish()
        file = await first.export("t", "a")
        first.close()
        second = serve(pair[1])  # the same store, another type
        turn = await second.answer("t", "a", [Message("user", "sun")], greedy)
        outcome = await turn.finish()
        assert outcome.known_tokens > 0 and outcome.version == 2
        made = await second.load("t", file)
        assert made.stats["tokens_seen"] > 0
        await (await second.answer("t", made.session, said, greedy)).finish()
        back = await second.export("t", made.session)
        second.close()
        third = serve(pair[0])
        assert (await third.load("t", back)).stats["turns"] == 4
        third.close()

    asyncio.run(run())


def test_options_of_the_server_make_its_loading(tmp_path):
    from ccm.serving.options import Options

    options = Options("dir:///x", "m", device="cuda:1", dtype="float16", load_in="8bit")
    assert options.loading == Loading("m", "cuda:1", "float16", "8bit", None, "auto")
    assert replace(options, load_in=None).loading.load_in is None


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match="bitsandbytes") as caught:
        ccm.load_model(load_in="4bit")
    assert isinstance(caught.value, CCMError)

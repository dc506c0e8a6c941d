"""How a memory is written, what it is looked up in, and which one is taken if nobody names one."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from tiny import random_rows, scramble, tiny_model, tiny_tokenizer

from ccm.core.compressor import Compressor, CompressorConfig
from ccm.errors import ConfigError, MismatchError
from ccm.files import adapter_folder
from ccm.methods import get_method, list_methods, open_method, register, spec
from ccm.methods.base import METHODS, Method
from ccm.methods.compressed import CCMConcat
from ccm.methods.default import CHAT, checked, default_memory, for_talking, saved_memory
from ccm.methods.references import NoContext
from ccm.methods.spec import parse
from ccm.session import Session

TOKENIZER = tiny_tokenizer()
FILE = '''
from __future__ import annotations
from dataclasses import dataclass
from ccm.methods import Method, register

@register("first-come")
@dataclass(frozen=True, kw_only=True)
class FirstCome(Method):
    """The first tokens stay."""
    tokens: int = 4

    def keep(self, row, leaving, queries):
        return row.slots.cat((row.slots, leaving)).slice(0, self.tokens)
'''
OTHER = FILE.replace("first-come", "other-come")


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Methods that a test registers are gone after it, and so are the modules of its files."""
    known = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(known)
    for name in [name for name in sys.modules if name.startswith("ccm_file_")]:
        del sys.modules[name]


@pytest.fixture
def mine(tmp_path: Path, registry: None) -> Path:
    file = tmp_path / "mine.py"
    file.write_text(FILE)
    return file


def tiny() -> Any:
    return tiny_model(vocab_size=len(TOKENIZER), max_position_embeddings=1024)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    scramble(Compressor(tiny(), CompressorConfig(slots=2, sink=0))).save_pretrained(tmp_path / "mine")
    return tmp_path / "mine"


# ---------------------------------------------------------------------- written


@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        ("full", "full", {}),
        (" streaming-llm:sink=0, window=12 ", "streaming-llm", {"sink": 0, "window": 12}),
        ("./my-adapter:slots=2", "./my-adapter", {"slots": 2}),
        ("me/memory", "me/memory", {}),
        ("./mine.py#b:share=0.5,fast=true", "./mine.py#b", {"share": 0.5, "fast": True}),
        ("ccm-merge:rule=ema,rule_options.weight=0.2", "ccm-merge", {"rule": "ema", "rule_options": {"weight": 0.2}}),
        ("default:window=8", "default", {"window": 8}),
    ],
)  # fmt: skip
def test_what_is_written_is_read(text: str, name: str, options: dict[str, Any]) -> None:
    read = parse(text)
    assert (read.name, read.options, read.text) == (name, options, text.strip())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "expected NAME"),
        (":sink=1", "expected NAME"),
        ("full:", None),
        ("full:window", "expected option=value"),
        ("full:window=", "expected option=value"),
        ("full:=1", "expected option=value"),
        ("full:window=1,window.a=2", "expected option=value"),
        ("full:window=1,window=2", "got window twice"),
        ("stream", "did you mean"),
        ("xyz", "unknown method or adapter 'xyz': expected one of"),
        ("no/such-adapter", "no adapter 'no/such-adapter'"),
        ("ccm-chat:slot=2", "method ccm-chat: unknown option slot; did you mean slots?"),
        ("ccm-chat:adapter=ccm-merge", "got two adapters, expected one: leave adapter=ccm-merge out"),
        ("streaming-llm:token=2", "unknown option token (options: sink, window, segment)"),
        ("streaming-llm:windw=2", "method streaming-llm: unknown option windw; did you mean window?"),
        ("streaming-llm:reader=1", "unknown option reader"),
        ("streaming-llm:window=many", "window is 'many', expected a whole number"),
        ("streaming-llm:window=1.5", "window is 1.5, expected a whole number"),
        ("streaming-llm:window=true", "window is True, expected a whole number"),
        ("streaming-llm:window=-1", "window is -1, expected a whole number of at least 0"),
        ("streaming-llm:segment=0", "segment is 0, expected a whole number of at least 1"),
        ("streaming-llm:sink=0,window=0", "keeps nothing"),
        ("ccm-concat:rule=3", "rule is 3, expected a text"),
        ("./missing.py", "no file missing.py"),
    ],
)
def test_what_is_wrong_is_told_in_one_line_before_a_model_is_there(text: str, words: str | None) -> None:
    if words is None:
        checked(text)
        return
    with pytest.raises(ConfigError) as told:
        checked(text)
    assert words in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize(
    "text",
    ["full", "streaming-llm:sink=2,window=9", "mean-pool:slots=3", "ccm-chat:slots=2,sink=4,window=8",
     "ccm-merge:rule=ema,rule_options.weight=0.2"],
)  # fmt: skip
def test_a_method_can_be_written_down_and_read_again(text: str) -> None:
    method = parse(text).method()
    assert parse(method.text).method() == method
    assert set(method.text.partition(":")[2].split(",")) == set(text.partition(":")[2].split(","))


def test_options_of_a_rule_come_with_its_name() -> None:
    with pytest.raises(ConfigError, match=r"got rule_options.blocks without a rule: name it too"):
        checked("ccm-chat:slots=2,rule_options.blocks=128")
    method = checked("ccm-chat:slots=2,rule=bounded,rule_options.blocks=128").method()
    assert (method.rule, method.rule_options) == ("bounded", {"blocks": 128})  # type: ignore[attr-defined]


# ---------------------------------------------------------------------- from elsewhere


def test_a_file_brings_its_method(mine: Path) -> None:
    method = open_method(f"{mine}:tokens=2", tiny())
    memory = method.fold(method.empty(), random_rows([[9]])[0])
    assert memory.rows[0].slots.length == 2
    assert open_method(f"{mine}#first-come", tiny()).tokens == 4  # type: ignore[attr-defined]
    assert "first-come" in list_methods() and method.text == "first-come:tokens=2"
    with pytest.raises(ConfigError, match="unknown option token; did you mean tokens"):
        checked(f"{mine}:token=2")


@pytest.mark.parametrize(
    ("code", "name", "words"),
    [
        ("x = 1", "", "has no method"),
        ("import no_such_module", "", "cannot be imported (ModuleNotFoundError"),
        ("def", "", "cannot be imported (SyntaxError"),
        ("raise SystemExit(7)", "", "cannot be imported (SystemExit: 7"),
        (FILE.replace("first-come", "full"), "", "'full' is registered already, by ccm.methods.references"),
        (FILE.partition("    def keep")[0], "", "does not say what becomes of text that leaves its window"),
        (FILE.replace("def keep(", "def fold("), "", "'first-come' has a 'fold' or 'take_in' of its own"),
        (FILE + OTHER.replace("FirstCome", "Other"), "", "several methods: name one of them"),
        (FILE, "#firstcome", "did you mean first-come?"),
    ],
)  # fmt: skip
def test_a_file_that_has_no_method_says_so(
    code: str, name: str, words: str, tmp_path: Path, registry: None
) -> None:
    code = code.replace("from __future__ import annotations", "")
    (tmp_path / "bad.py").write_text(code)
    full = METHODS["full"]
    with pytest.raises(ConfigError) as told:
        checked(f"{tmp_path / 'bad.py'}{name}")
    assert words in str(told.value)
    assert METHODS["full"] is full


def test_an_installed_package_brings_its_method(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(mine.parent))
    points = [EntryPoint("first-come", "mine", spec.GROUP), EntryPoint("gone", "no_such_module", spec.GROUP)]
    monkeypatch.setattr(spec, "entry_points", lambda group: points if group == "ccm.methods" else [])
    assert {"first-come", "gone"} <= set(list_methods()) and "first-come" not in METHODS
    assert get_method("first-come", tokens=2).name == "first-come"
    with pytest.raises(ConfigError, match=r"gone of the installed package .* cannot be imported"):
        checked("gone")
    sys.modules.pop("mine")


def test_a_name_is_taken_once(registry: None) -> None:
    with pytest.raises(ConfigError, match="registered already"):
        register("none")(type("Ours", (Method,), {"__module__": "ours"}))
    assert METHODS["none"] is NoContext


# ---------------------------------------------------------------------- the default


def test_a_model_without_an_adapter_has_a_memory_and_is_told_of_it(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny()
    with caplog.at_level(logging.WARNING):
        session = Session.open(model, TOKENIZER)
    (said,) = [r.getMessage() for r in caplog.records]
    assert session.method.name == default_memory(model) in said
    assert "ccm train --init" in said and "\n" not in said
    session.append("My cat is called Miso.")
    assert session.stats()["tokens_seen"] > 0
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        Session.open(model, TOKENIZER, "streaming-llm:window=8")
    assert not caplog.records, "whoever names a memory is told nothing"


def test_the_adapter_of_a_model_is_its_default(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(adapter_folder, "find", lambda name: adapter)
    method = open_method(None, tiny())
    assert isinstance(method, CCMConcat) and not caplog.records
    assert {name: getattr(method, name) for name in CHAT} == CHAT
    assert open_method("default:window=8", tiny()).window == 8
    assert default_memory(tiny_model(seed=1)) != "ccm-chat", "one for other weights is none"


def test_a_chat_reads_words_beside_the_slots(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_folder, "find", lambda name: adapter)
    assert for_talking(parse("default:window=8"), tiny()).text == "slots-and-words:window=8"
    assert for_talking(parse("snapkv"), tiny()).text == "snapkv"
    assert for_talking(parse("default"), tiny_model(seed=1)).text == "default", "no adapter, no slots to ask"


def test_an_adapter_has_a_window_in_conversations_unless_it_is_told(adapter: Path) -> None:
    assert open_method(f"{adapter}:sink=0,window=0", tiny()).window == 0
    assert open_method(str(adapter), tiny()).window == CHAT["window"]
    assert get_method("ccm-concat", adapter=str(adapter)).bind(tiny()).window == 0  # as evaluation has it
    with pytest.raises(
        ConfigError, match=r"grows to 1004 positions, 1132 with the next segment, and .* is 1024"
    ):
        open_method("streaming-llm:window=1000", tiny())
    with pytest.raises(MismatchError, match="memory that needs no training"):
        open_method(str(adapter), tiny_model("qwen2", hidden_size=64))


def test_a_compressor_without_weights_warns_once_before_its_first_fold(
    adapter: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compressor = Compressor(tiny(), CompressorConfig(slots=2))
    assert not caplog.records
    segment = random_rows([[1, 5]])[0]
    for _ in range(2):
        compressor.compress(segment[1:])
    noise = [r for r in caplog.records if "noise" in r.getMessage()]
    assert len(noise) == 1
    caplog.clear()
    Compressor.from_pretrained(tiny(), adapter).compress(segment[1:])
    scramble(Compressor(tiny(), CompressorConfig(slots=2))).compress(segment[1:])
    assert not [r for r in caplog.records if "noise" in r.getMessage()]


# ---------------------------------------------------------------------- files of sessions


def test_a_saved_session_names_its_memory(adapter: Path, tmp_path: Path) -> None:
    file = tmp_path / "chat.ccm"
    model = tiny()
    session = Session.open(model, TOKENIZER, "streaming-llm:sink=1,window=20")
    session.append("My cat is called Miso.")
    session.save(file)
    assert saved_memory(file).text == "streaming-llm:sink=1,window=20"
    again = Session.load(file, open_method("streaming-llm", model), TOKENIZER)
    assert again.method == session.method and again.stats() == session.stats()
    other = open_method("mean-pool", model)
    with pytest.raises(MismatchError, match="made by"):
        Session.load(file, other, TOKENIZER)
    for memory, other in (
        ("streaming-llm", "streaming-llm:window=20"),
        ("streaming-llm:sink=1", "streaming-llm"),
    ):
        session = Session.open(model, TOKENIZER, memory)
        session.save(file)
        assert Session.load(file, open_method(other, model), TOKENIZER).method == session.method
    compressor = Compressor.from_pretrained(model, adapter)
    Session(compressor, TOKENIZER, window=9).save(file)
    assert saved_memory(file).name == str(adapter) and saved_memory(file).options["window"] == 9
    scramble(compressor).source = ""
    Session(compressor, TOKENIZER).save(file)
    assert saved_memory(file).name == "ccm-chat", "as in files from before they had names"


def test_a_session_file_runs_no_code(mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "chat.ccm"
    session = Session.open(tiny(), TOKENIZER, f"{mine}:tokens=2")
    session.save(file)
    assert saved_memory(file).text == "first-come:tokens=2"
    del METHODS["first-come"]
    with pytest.raises(ConfigError, match=r"no such method is known here: give it by --memory"):
        saved_memory(file)
    monkeypatch.setattr(Method, "text", f"{mine}:tokens=2")
    session.save(file)
    mine.write_text("raise SystemExit")
    with pytest.raises(ConfigError, match="only run if you name it"):
        saved_memory(file)

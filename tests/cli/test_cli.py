"""The command line, on a tiny model that is saved to a folder."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from runs import environment
from tiny import scramble, tiny_model, tiny_tokenizer

import ccm
import ccm.cli.repl
from ccm import cli
from ccm.cli.progress import Tenths, stages
from ccm.core.compressor import Compressor, CompressorConfig
from ccm.core.memory import Memory
from ccm.data.chitchat import Conversation, Turn
from ccm.data.rows import ConversationRow
from ccm.evaluation import demo
from ccm.evaluation.demo import Player, Trace, choose_players
from ccm.evaluation.demo import play as play_all
from ccm.evaluation.share import turn_nll
from ccm.methods import get_method
from ccm.session import Session

COMMANDS = ["chat", "demo", "train", "doctor", "memory", "memory inspect", "memory show"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``model``, and adapters ``ccm-concat`` and ``ccm-merge`` for it."""
    home = tmp_path_factory.mktemp("cli")
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=1024)
    model.save_pretrained(home / "model")
    tokenizer.save_pretrained(home / "model")
    for name, rule in (("ccm-concat", "concat"), ("ccm-merge", "mean")):
        model, _ = ccm.load_model(str(home / "model"))
        scramble(Compressor(model, CompressorConfig(slots=2, sink=0, rule=rule))).save_pretrained(home / name)
    return home


@pytest.fixture
def talks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up conversations in place of the data set."""

    def load(split: str, **_: object) -> list[Conversation]:
        turns = [
            Turn("assistant" if i % 2 else "user", f"{word} {i}") for i, word in enumerate(["hi", "well"] * 6)
        ]
        return [Conversation(f"{split}{n}", ("a", "b"), tuple(turns[: 12 - n])) for n in range(3)]

    monkeypatch.setattr("ccm.data.chitchat.load_chitchat", load)


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    """The only line on stderr; nothing is on stdout."""
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    return lines[0]


# ---------------------------------------------------------------------- help, errors


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*command.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert "Usage: ccm " + command in text
    assert "Example" in text or command == "memory"


def test_help_is_quick_because_it_imports_nothing_heavy() -> None:
    code = "import sys; from ccm.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert all(name in result.stdout for name in COMMANDS[:5])


def test_no_arguments_show_help_and_version_shows_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    assert "Usage: ccm" in capsys.readouterr().out
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"ccm {ccm.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nonsense"], "nonsense"),
        (["demo", "--nonsense"], "--nonsense"),
        (["demo", "--turns", "many"], "--turns"),
        (["demo", "--turns", "4"], "--turns"),
        (["demo", "--conversations", "0"], "--conversations"),
        (["demo", "--conversations", "9"], "9"),
        (["demo", "--methods", "h3o"], "unknown method or adapter 'h3o'"),
        (["demo", "--model", "no-such-folder/model"], "no-such-folder"),
        (["train"], "expected a recipe"),
        (["train", "missing.yaml"], "missing.yaml"),
        (["memory", "inspect", "missing.ccm"], "no memory file"),
        (["memory", "show", "missing.ccm"], "no memory file"),
        (["chat", "--load", "missing.ccm", "--slots", "1"], "no memory file"),
        (["chat", "--adapter", "no-such/adapter"], "no adapter"),
        (["chat", "--adapter", "ccm-merge", "--memory", "none"], "leave --adapter out"),
        (["chat", "--memory", "streaming"], "did you mean streaming-llm?"),
        (["chat", "--memory", "streaming-llm:windw=3"], "unknown option windw; did you mean window?"),
        (["chat", "--memory", "streaming-llm:window=many"], "window is 'many', expected a whole number"),
        (["chat", "--memory", "streaming-llm:window"], "expected option=value"),
        (["chat", "--memory", "./mine.py"], "no file ./mine.py"),
        (["chat", "--memory", "ccm-chat"], "train an adapter for this one"),
        (["chat", "--load", "missing.ccm"], "no memory file"),
        (["chat", "--memory", "ccm-chat:adapter=ccm-merge"], "got two adapters"),
        (["demo", "--methods", "none,streaming-llm:windw=3"], "did you mean window?"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    arguments: list[str],
    words: str,
    home: Path,
    talks: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if arguments[0] in ("demo", "chat") and "--model" not in arguments:
        arguments = [*arguments, "--model", str(home / "model")]
    if arguments[0] == "demo" and "--methods" not in arguments:
        arguments = [*arguments, "--methods", "none"]
    assert cli.main(arguments) == 2
    assert words in one_error(capsys)
    assert not list(tmp_path.iterdir()), "something was left behind"


def test_ctrl_c_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ccm.cli.checks.checks", interrupt)
    assert cli.main(["doctor"]) == 130


# ---------------------------------------------------------------------- doctor, memory


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main(["doctor", "--json"])
    result = json.loads(capsys.readouterr().out)
    failed = [check for check in result["checks"] if check["required"] and not check["ok"]]
    assert code == (1 if failed else 0) and result["ok"] == (not failed)
    assert all(check["fix"] for check in failed)
    assert cli.main(["doctor"]) == code
    printed = capsys.readouterr().out
    assert "embedded model" in printed
    assert all(check["fix"] in printed for check in result["checks"] if not check["ok"])


@pytest.fixture
def saved(home: Path, tmp_path: Path) -> Path:
    model, tokenizer = ccm.load_model(str(home / "model"))
    session = Session(Compressor.from_pretrained(model, home / "ccm-merge"), tokenizer)
    session.append("My cat is called Miso.")
    session.save(tmp_path / "chat.ccm")
    return tmp_path / "chat.ccm"


def test_letters_that_cannot_be_shown_or_read_are_replaced(home: Path) -> None:
    """A terminal in Latin-1 has no check mark, and a pipe may bring Latin-1 where UTF-8 is expected."""

    def run(encoding: str, *arguments: str, given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-m", "ccm", *arguments]
        return subprocess.run(
            command, input=given, env={**environment(), "PYTHONIOENCODING": encoding}, capture_output=True
        )

    shown = run("latin-1:strict", "doctor")
    assert b"Traceback" not in shown.stderr and b"? " in shown.stdout and b"shipped adapters" in shown.stdout
    talked = run(
        "utf-8:strict", "chat", "--model", str(home / "model"), "--adapter", str(home / "ccm-concat"),
        "--max-tokens", "2", given=b"caf\xe9\n/history\n",
    )  # fmt: skip
    assert talked.returncode == 0 and "caf\N{REPLACEMENT CHARACTER}".encode() in talked.stdout, talked.stderr


@pytest.mark.parametrize("columns", [None, "60"])
def test_no_name_is_cut_in_a_file_or_on_a_narrow_terminal(
    columns: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    assert cli.main(["methods"]) == 0 and cli.main(["data", "list"]) == 0
    out = capsys.readouterr().out
    assert "…" not in out
    assert "adapter, words" in out and "gradient, words" in out and "r-cran-janeaustenr" in out
    whole = "Everything; the blocks asked for are read" in out
    assert whole == (columns is None) and (max(map(len, out.splitlines())) <= 60) == bool(columns)


def test_memory_inspect(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["memory", "inspect", str(saved), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["rows"][0]["slots"] == 2
    assert result["session"]["turns"] == 1
    assert result["nbytes"] == result["rows"][0]["nbytes"] > 0
    assert result["rows"][0]["reach"] == result["rows"][0]["tokens_folded"] > 0
    assert result["rows"][0]["tokens_merged"] == 0
    assert cli.main(["memory", "inspect", str(saved)]) == 0
    shown = capsys.readouterr().out
    assert "session of 1 turns" in shown
    assert "tokens folded" in shown and f"{result['nbytes']:,}" in shown  # whole, on 80 columns


def test_memory_inspect_refuses_a_damaged_file(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = bytearray(saved.read_bytes())
    data[-3] ^= 1
    saved.write_bytes(bytes(data))
    assert cli.main(["memory", "inspect", str(saved)]) == 2
    assert "changed after it was written" in one_error(capsys)
    saved.write_bytes(bytes(data[:40]))
    assert cli.main(["memory", "inspect", str(saved)]) == 2
    assert "no usable stored memory" in one_error(capsys)


def test_memory_show(saved: Path, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["memory", "show", str(saved), "--json"]) == 0  # without the model
    result = json.loads(capsys.readouterr().out)
    assert [part["kind"] for part in result["parts"]] == ["slots"] and result["parts"][0]["turns"] == [0, 1]
    assert result["turns"][0]["text"] == "My cat is called Miso." and result["read"] == []
    asked = ["--ask", "What is it called?", "--model", str(home / "model"), "--png", str(tmp_path / "m.png")]
    assert cli.main(["memory", "show", str(saved), "--json", *asked]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["answer"] and [line["kind"] for line in result["lines"]] == ["slots", "window", "prompt"]
    assert len(result["layers"]) == len(result["read"]) == 3
    assert all(abs(sum(shares) - 1) < 1e-4 for shares in result["read"])
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main(["memory", "show", str(saved), *asked]) == 0
    shown = capsys.readouterr().out
    assert "slots 0–1" in shown and "folded" in shown and "turn 2, user" in shown and "1–1" in shown
    assert "asked: What is it called?" in shown and "\x18" not in shown


def test_memory_show_refuses_what_is_no_session(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memory, metadata = Memory.load(saved)
    memory.save(tmp_path / "bare.ccm")
    assert cli.main(["memory", "show", str(tmp_path / "bare.ccm")]) == 2
    assert "holds a memory but no session" in one_error(capsys)
    state = json.loads(metadata["session"])
    for said in ([["user", "hello"]], [["user", 5, 3]], [["user", "hi", -3]], "nonsense"):
        memory.save(tmp_path / "odd.ccm", {"session": json.dumps({**state, "said": said})})
        assert cli.main(["memory", "show", str(tmp_path / "odd.ccm")]) == 2
        assert "holds a memory but no session" in one_error(capsys)
    del state["said"]  # as older releases wrote it
    memory.save(tmp_path / "old.ccm", {"session": json.dumps(state)})
    assert cli.main(["memory", "show", str(tmp_path / "old.ccm")]) == 0
    assert "before turns were kept" in capsys.readouterr().out


# ---------------------------------------------------------------------- progress


def test_stages_are_lines_where_nobody_sees_a_spinner(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with stages("[reading]") as tell:
        tell("writing")
    assert capsys.readouterr() == ("", "[reading]\nwriting\n")
    with stages("reading", tells=True) as tell:
        tell("writing")
    assert capsys.readouterr() == ("", "writing\n")
    monkeypatch.setattr("ccm.cli.progress.moves", lambda console: True)
    with stages("reading") as tell:
        tell("writing")
    assert "reading\n" not in capsys.readouterr().err, "the control: there it moves"


def test_a_bar_that_nobody_sees_is_a_line_for_every_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    for console, said in (
        (Console(file=io.StringIO()), "10%: a\n52%: c\n100%: d\n"),
        (Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "xterm"}), ""),
        (Console(quiet=True), ""),
    ):
        tell = Tenths(console)
        for share, text in ((0.05, "0"), (0.1, "a"), (0.19, "b"), (0.52, "c"), (1, "d"), (1, "e")):
            tell(share, text)
        assert capsys.readouterr().err == said


# ---------------------------------------------------------------------- chat


@pytest.fixture
def talk(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Chat with piped lines; returns what was shown."""

    def run(*lines: str, options: tuple[str, ...] = ()) -> str:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        where = ["--model", str(home / "model"), "--adapter", str(home / "ccm-merge"), "--max-tokens", "5"]
        assert cli.main(["chat", *where, *options]) == 0
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize(
    ("memory", "shown"),
    [
        ("none", "[nothing is kept · full context"),
        ("streaming-llm:sink=1,window=0", "no token is told apart"),
        ("full", "reaches back to the start, ~"),
    ],
)
def test_the_meter_of_a_memory_that_keeps_nothing_or_all(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], memory: str, shown: str
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello.\n/memory\n"))
    model = str(home / "model")
    assert cli.main(["chat", "--model", model, "--memory", memory, "--max-tokens", "5"]) == 0
    out = capsys.readouterr().out
    assert shown in out and "9,223" not in out


def test_chat_shows_the_memory_after_each_answer(talk) -> None:
    shown = talk("Hello there.", "", "And now?", "/memory", options=("--window", "200", "--sink", "1"))
    assert shown.count("full context") == 3  # two meters and /memory
    assert "tokens folded" in shown
    assert "error" not in shown
    assert shown.count("reaches back to the start, ~200 tokens when full") == 3
    assert "Hello there." in shown and "at most" in shown and "█" in shown, "the memory, drawn"


def test_chat_saves_loads_and_forgets(talk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shown = talk(
        "Hello.",
        "/save a.ccm",
        "/reset",
        "/switch",
        "/load a.ccm",
        "/switch",
        options=("--system", "Be kind."),
    )
    assert "saved to a.ccm" in shown
    assert "main, 1 turns" in shown  # the system message stays
    assert "loaded a.ccm, 3 turns" in shown
    shown = talk("/switch", options=("--load", "a.ccm"))
    assert "main, 3 turns" in shown


def test_chat_replaces_no_turns_that_it_does_not_know(
    talk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused = "a.ccm holds turns that this session does not know"
    assert talk("Hello.", "/save a.ccm", "More.", "/undo", "/save a.ccm").count("saved to") == 2
    (tmp_path / "old.ccm").write_bytes((tmp_path / "a.ccm").read_bytes())
    shown = talk("/save a.ccm", "/load a.ccm", "More.", "/save ./a.ccm", "/reset", "/save a.ccm")
    assert shown.count(refused) == 2 and shown.count("saved to") == 1, "other talks, before and after"
    before = (tmp_path / "a.ccm").read_bytes()
    save = Session.save

    def meanwhile(session: Session, path: Path) -> None:  # another process, between two savings of this one
        save(session, path)
        (tmp_path / "a.ccm").write_bytes((tmp_path / "old.ccm").read_bytes())

    monkeypatch.setattr(Session, "save", meanwhile)
    shown = talk("More.", "/save b.ccm", "/save a.ccm", options=("--load", "a.ccm"))
    assert shown.count(refused) == 1 and (tmp_path / "a.ccm").read_bytes() != before
    monkeypatch.setattr(Session, "save", save)
    shown = talk("/fork f", "/save a.ccm", "/switch f", "More.", "/save a.ccm", options=("--load", "a.ccm"))
    assert shown.count("saved to a.ccm") == 2, "the same turns, and more"
    shown = talk("/fork f", "More.", "/save a.ccm", "/switch f", "/save a.ccm", options=("--load", "a.ccm"))
    assert shown.count(refused) == 1, "a copy that was told less"


def test_chat_on_a_model_without_an_adapter(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog
) -> None:
    file = tmp_path / "a.ccm"

    def chat(*options: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(f"Hello.\n/save {file}\n/memory\n"))
        caplog.clear()
        code = cli.main(["chat", "--model", str(home / "model"), "--max-tokens", "5", *options])
        return code, capsys.readouterr().out, caplog.text

    code, shown, said = chat()
    assert code == 0 and "full context" in shown and "error" not in shown
    assert said.count("ccm train --init") == 1 and "needs no training" in said
    file.unlink()
    code, shown, said = chat("--memory", "snapkv:tokens=9,window=8,sink=2")
    assert code == 0 and "9 slots + 8 window" in shown and not said
    code, shown, _ = chat("--load", str(file))  # the file says which method, and its sizes
    assert code == 0 and "9 slots + 8 window" in shown
    for wrong, words in (
        (("--memory", "tova"), "made by"),
        (("--memory", "snapkv:tokens=3"), "brings its own past and sizes"),
    ):
        code = cli.main(["chat", "--model", str(home / "model"), "--load", str(file), *wrong])
        assert code == 2 and words in one_error(capsys)


def test_chat_forks(talk) -> None:
    shown = talk("Hello.", "/fork", "/fork b", "/fork b", "/switch b", "More.", "/switch main", "/switch c")
    assert "copied to fork-1" in shown
    assert "there is a session 'b' already" in shown
    assert "* main, 2 turns" in shown and "  b, 4 turns" in shown
    assert "unknown session 'c'" in shown


def test_chat_goes_on_after_errors(talk, home: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.ccm"
    model, tokenizer = ccm.load_model(str(home / "model"))
    Session(Compressor.from_pretrained(model, home / "ccm-concat"), tokenizer).save(other)
    shown = talk(
        "/load nowhere",
        f"/load {other}",
        "/save",
        "/save no/such/folder",
        "/what",
        "Hello.",
        "/quit",
        "/what",
    )
    assert shown.count("error: ") == 5
    assert " and adapter " in shown
    assert "full context" in shown


def test_ctrl_c_stops_the_answer_only(talk, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Compressor.write
    calls = []

    def first_is_interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return write(*args, **kwargs)

    monkeypatch.setattr(Compressor, "write", first_is_interrupted)
    shown = talk("Hello.", "/switch", "Hello again.", "/switch")
    assert "this turn is forgotten" in shown
    assert "main, 0 turns" in shown and "main, 2 turns" in shown


# ---------------------------------------------------------------------- demo


def play(home: Path, *options: str) -> int:
    methods = f"window,{home / 'ccm-concat'},{home / 'ccm-merge'}"
    return cli.main(
        ["demo", "--model", str(home / "model"), "--methods", methods, "--conversations", "2", *options]
    )


def test_demo_json(home: Path, talks: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "demo.png"
    assert play(home, "--turns", "6", "--plot", str(picture), "--json") == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert out.count("\n") == 1
    assert (result["task"], result["turns"], result["conversations"]) == ("chitchat", 6, 2)
    methods = result["methods"]
    assert set(methods) == {"none", "full", "ccm-concat", "ccm-merge", "window", "window-merge"}
    for values in methods.values():
        assert math.isclose(values["perplexity"], math.exp(values["nll"]))
        assert {"recovered_share", "kv_bytes", "seconds"} <= set(values)
        assert len(values["nll_by_turn"]) == 6
    assert math.isclose(result["gain"][0], methods["none"]["nll"] - methods["full"]["nll"])
    shares = {name: values["recovered_share"] for name, values in methods.items()}
    assert (shares["none"], shares["full"]) in {(0, 1), (None, None)}, (
        "random weights may have nothing to keep"
    )
    assert f"n = 2 conversations, {result['target_tokens']} scored tokens" in err
    assert err.startswith("conversation 1 of 2, 6 methods\nconversation 2 of 2, 6 methods\n"), "no terminal"
    assert methods["none"]["kv_bytes"] == 0
    assert methods["window"]["kv_bytes_by_turn"] == methods["ccm-concat"]["kv_bytes_by_turn"]
    assert methods["window-merge"]["kv_bytes_by_turn"] == methods["ccm-merge"]["kv_bytes_by_turn"]
    assert methods["ccm-concat"]["kv_bytes"] == 5 * methods["ccm-merge"]["kv_bytes"]
    assert "recovered" in err and "same KV bytes as ccm-concat" in err
    assert picture.read_bytes().startswith(b"\x89PNG")


def traced(*nll: float) -> Trace:
    """A conversation for each number, of five turns; the last one is scored, over ten tokens."""
    turns = [{"nll": 40.0, "tokens": 10}] * 4
    steps = [{"kv_bytes": 46_080, "fold_seconds": 0.1, "ttft_seconds": 0.1}] * 5
    return Trace([{"queries": [*turns, {"nll": each, "tokens": 10}], "steps": steps} for each in nll])


@pytest.mark.parametrize(("full", "kept"), [((20.0, 22.0, 21.0), True), ((20.0, 45.0, 33.0), False)])
def test_demo_says_on_how_much_it_stands_and_where_there_is_nothing_to_keep(
    full: tuple[float, ...], kept: bool
) -> None:
    """In a table of 80 columns that breaks no name of a method."""
    traces = {
        "none": traced(30.0, 32.0, 31.0),
        "full": traced(*full),
        "attention-matching": traced(25.0, 27.0, 26.0),
        "window-am": traced(28.0, 29.0, 30.0),
    }
    players = choose_players(["window", "ccm-concat", "attention-matching"])
    players = [player for player in players if player.name in traces]
    assert [player.name for player in players] == list(traces)
    console = Console(file=io.StringIO(), width=80)
    console.print(demo._table(players, traces, final=True))
    out = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, out.splitlines())) <= 80 and "attention-matching" in out
    assert "n = 3 conversations, 30 scored tokens" in out
    assert ("nothing to keep" in out, "0.500" in out, "1.000" in out) == (not kept, kept, kept)
    values = demo._summary(players[2], traces, 5)
    share, ends = values["recovered_share"], values["share_ci"]
    assert (share == pytest.approx(0.5) and ends) if kept else share is ends is None


def test_demo_without_matplotlib_says_what_to_install(
    home: Path,
    talks: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert play(home, "--turns", "5", "--plot", str(tmp_path / "demo.png")) == 0
    assert "pip install 'compressed-context-memory[plot]'" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_players_are_scored_on_every_turn_with_what_they_hold_of_those_before() -> None:
    model = tiny_model()
    segments = tuple(tuple(range(10 * i + 3, 10 * i + 9)) for i in range(3))
    row = ConversationRow("a", segments, ((1, 6),) * 3)
    players = [
        Player("full", get_method("full")),
        Player("window", get_method("window"), same_bytes_as="full"),
    ]
    seen: list[tuple[str, int]] = []
    traces = play_all(model, None, [row, row], players, lambda name, turn, _: seen.append((name, turn)))
    assert seen == [(name, turn) for _ in range(2) for name in ("full", "window") for turn in range(3)]
    run = get_method("full").open(model)
    for turn, ids in enumerate(segments):
        nll, tokens = turn_nll(run.logits(ids), ids, (1, 6))
        for trace in traces.values():  # a window of as many bytes as everything is everything
            assert math.isclose(trace.nll_at(turn), nll / tokens, rel_tol=1e-5)
            assert trace.kv_bytes_at(turn) == run.kv_bytes
        run.append(ids)


def test_a_window_plays_at_the_bytes_of_each_compressed_method() -> None:
    players = choose_players(["window", "ccm-concat", "ccm-merge", "streaming-llm"])
    assert {p.name: p.same_bytes_as for p in players} == {
        "none": None,
        "full": None,
        "ccm-concat": None,
        "ccm-merge": None,
        "streaming-llm": None,
        "window": "ccm-concat",
        "window-merge": "ccm-merge",
    }
    assert [p.same_bytes_as for p in choose_players(["window"])] == [None, None, None]
    shipped = {p.name: p for p in choose_players(["window", "ccm-chat"])}  # an adapter, not a method
    assert shipped["window"].same_bytes_as == "ccm-chat" and shipped["ccm-chat"].method.adapter == "ccm-chat"

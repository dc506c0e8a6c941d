"""Bad input to every command: one line, exit code 2, and nothing heavy was imported to find that out."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ccm import cli, hub
from ccm.errors import CCMError, ConfigError
from ccm.evaluation.suites import SUITES
from ccm.files import adapter_folder
from ccm.methods import get_method, list_methods
from ccm.models import known, placement
from ccm.models.placement import place
from ccm.serving import settings
from ccm.serving.store import codec

#: Arguments, and words of the line. Beside them lie a folder ``model`` of a model, one of an adapter, recipes, and
#: the beginning of a memory file.
REFUSED: list[tuple[str, str]] = [
    ("nonsense", "nonsense"),
    ("bench --only nobody", "unknown contender 'nobody'"),
    ("bench --env nobody=run.yaml", "unknown contender 'nobody'"),
    ("bench --env vllm", "--env is 'vllm': expected NAME=PYTHON"),
    ("bench --env vllm=absent", "--env vllm: no file 'absent'"),
    ("bench --model ./modle", "no model './modle': there is no such folder"),
    ("bench --llama absent.gguf", "no file 'absent.gguf'"),
    ("bench --out absent/bench.json", "cannot write absent/bench.json: there is no folder absent"),
    ("chat --load absent.ccm", "no memory file at absent.ccm"),
    ("chat --load run.yaml", "run.yaml: this is no usable stored memory"),
    ("chat --load me.ccm --compare", "no full context to compare with"),
    ("chat --load me.ccm --system Hello", "brings its own past and sizes"),
    ("chat --load me.ccm --memory snapkv:tokens=9", "brings its own past and sizes"),
    ("chat --model model --llama absent.gguf", "no file 'absent.gguf'"),
    ("methods snapvk", "unknown method or adapter 'snapvk' (did you mean snapkv?)"),
    ("leaderboard --methods snapvk", "unknown method or adapter 'snapvk' (did you mean snapkv?)"),
    ("leaderboard --model ./modle", "no model './modle': there is no such folder"),
    ("--nonsense", "--nonsense"),
    # where a model goes, in every command that loads one
    *(
        (f"{command} {wrong}", words)
        for command in (
            "chat", "demo", "eval quick", "plan --users 1 --turns 1", "serve --port 0", "train run.yaml"
        )
        for wrong, words in (
            ("--nonsense", "No such option"),
            ("--device abacus", "device 'abacus': no such device"),
            ("--dtype float8", "unknown type of weights 'float8'"),
            ("--load-in 3bit", "unknown kind of quantized weights '3bit'"),
        )
    ),
    # which model, and which memory
    *(
        (f"{command} {wrong}", words)
        for command in ("chat", "demo", "eval quick", "plan --users 1 --turns 1", "serve --port 0")
        for wrong, words in (
            ("--model ./modle", "no model './modle': there is no such folder (did you mean model?)"),
            ("--model absent/", "no model 'absent/': there is no such folder"),
            ("--model empty", "no model 'empty': the folder has no config.json"),
            ("--model run.yaml", "no model 'run.yaml': it is a file"),
            ("--model x.gguf", "no file 'x.gguf'"),
            ("--model a//b", "no model 'a//b': neither a folder here nor a name as the hub has them"),
            ("--model somebody/model", "the model hub is switched off (HF_HUB_OFFLINE)"),
            ("--memory streaming", "unknown method or adapter 'streaming' (did you mean streaming-llm?)"),
            ("--memory streaming-llm:windw=3", "unknown option windw; did you mean window?"),
            ("--memory ccm-chat:windw=3", "unknown option windw; did you mean window?"),
            ("--memory streaming-llm:window=many", "window is 'many', expected a whole number"),
            ("--memory streaming-llm:window", "expected option=value"),
            ("--memory ./adaptr", "no adapter './adaptr': there is no such folder (did you mean adapter?)"),
            ("--memory ./mine.py", "no file ./mine.py"),
            ("--memory model", "no adapter 'model': the folder has no ccm_config.json"),
        )
    ),
    ("demo --turns 4", "--turns"),
    ("demo --turns many", "--turns"),
    ("demo --conversations 0", "--conversations"),
    ("demo --plot absent/demo.png", "there is no folder absent"),
    ("demo --plot model", "cannot write model: it is a folder"),
    ("demo --methods none,h3o", "unknown method or adapter 'h3o'"),
    ("eval", "SUITE"),
    ("eval nonsense", "unknown suite 'nonsense': expected one of"),
    ("eval absent.jsonl", "absent.jsonl is not there"),
    ("eval quick --methods h3o", "unknown method or adapter 'h3o'"),
    ("eval quick --methods none,snapkv@h3o", "unknown method or adapter 'h3o'"),
    ("eval quick --limit 0", "--limit"),
    ("eval quick --show many", "--show"),
    ("eval quick --out run.yaml", "cannot write to run.yaml: run.yaml is a file"),
    ("leaderboard --out run.yaml/records", "run.yaml is a file; give another folder"),
    ("train run.yaml --out run.yaml", "cannot write to run.yaml: run.yaml is a file"),
    ("eval quick --strict", "--strict is for a .jsonl file of your own"),
    ("eval quick --data files", "--data is for a benchmark of others"),
    ("eval quick --memory snapkv --adapter adapter", "leave --adapter out"),
    ("eval ruler --judge http://x", "both --judge URL and --judge-model NAME"),
    ("eval ruler --lengths many", "--lengths is 'many'"),
    ("report absent.json", "absent.json: no such file or folder"),
    ("report empty", "no *.json in this folder"),
    ("train", "expected a recipe"),
    ("train absent.yaml", "absent.yaml"),
    ("train model/config.json", "unknown key"),
    ("train run.yaml steps", "expected key=value"),
    ("train run.yaml stepz=3", "unknown key stepz; did you mean steps?"),
    ("train run.yaml compressor.slot=3", "unknown key compressor.slot; did you mean compressor.slots?"),
    ("train run.yaml --dtype float16", "gradients leave its range"),
    ("train --init model --minutes 3", "--init takes a model"),
    ("train --init ./modle", "there is no such folder (did you mean model?)"),
    ("train --init model --device-map auto", "leave --device-map out"),
    ("plan", "--users"),
    ("plan --users 0 --turns 1", "--users"),
    ("plan --users 1 --turns 1 --store ftp://x", "unknown store 'ftp'"),
    ("serve --host 0.0.0.0", "open to other machines"),
    ("serve --host 0.0.0.0 --api-keys absent", "make one with: ccm key"),
    ("serve --port 70000", "--port"),
    ("serve --store x", "expected a URL"),
    ("serve --store ftp://x", "unknown store 'ftp'"),
    ("serve --port 0 --store sqlite:model", "cannot open model for writing"),
    ("serve --memory snapkv --window 3", "leave --window out"),
    ("serve --model model --llama absent.gguf", "no file 'absent.gguf'"),
    ("serve --llama default --vllm http://x", "one of them writes the answers"),
    ("serve --resend never", "unknown resend 'never'"),
    ("serve --precision int3", "unknown precision 'int3'"),
    ("serve --on-disconnect x", "unknown disconnect 'x'"),
    ("serve --log-format xml", "unknown log format 'xml'"),
    ("serve --replicas 2", "give --ray"),
    ("key", "argument"),
    ("key a/b --api-keys keys.txt", "tenant 'a/b'"),
    ("data show nonsense", "nonsense"),
    ("data show jsonl --split nonsense", "nonsense"),
    ("data show jsonl --option x", "expected KEY=VALUE"),
    ("data pack run.yaml --tokens many --out x", "--tokens: got 'many'"),
    ("train --init model --out run.yaml", "run.yaml is there already: give another name with --out"),
    ("data pack absent.yaml --tokens 1M --out x", "absent.yaml"),
    ("memory inspect", "argument"),
    ("memory inspect absent.ccm", "no memory file at absent.ccm"),
    ("memory inspect run.yaml", "run.yaml: this is no usable stored memory"),
    ("memory show absent.ccm", "no memory file at absent.ccm"),
    ("memory show run.yaml", "run.yaml: this is no usable stored memory"),
    ("memory show me.ccm --png absent/me.png", "there is no folder absent"),
    ("doctor --nonsense", "--nonsense"),
]  # fmt: skip
#: Those that need what is heavy: torch knows the devices, and reads memories.
LATER = [
    ("methods --family nope", "unknown family 'nope': expected one of"),
    ("leaderboard --tasks nope", "unknown task of the leaderboard 'nope'"),
    ("chat --device cuda:99", "cuda:99"),
    ("memory inspect me.ccm", "me.ccm: "),
    ("train gone.yaml", "data.jsonl.path: absent.jsonl is not there"),
    ("train run.yaml packed=absent.rows", "packed: absent.rows is not there"),
]
WALK = """
import contextlib, io, json, sys
from ccm.cli import main
answers = []
for line in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(line.split())
        except BaseException as error:
            code = repr(error)
    heavy = [name for name in ("torch", "transformers") if name in sys.modules]
    answers.append([code, out.getvalue(), err.getvalue(), heavy])
json.dump(answers, sys.stdout)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refused")
    for name, file in (("model", "config.json"), ("adapter", "ccm_config.json")):
        (folder / name).mkdir()
        (folder / name / file).write_text('{"model_type": "llama"}')
    (folder / "empty").mkdir()
    (folder / "run.yaml").write_text("steps: 3\n")
    (folder / "gone.yaml").write_text("data: {jsonl: {path: absent.jsonl}}\n")
    header = b'{"__metadata__": {"format": "ccm-memory/1"}}'
    (folder / "me.ccm").write_bytes(len(header).to_bytes(8, "little") + header)
    return folder


def walk(lines: list[str], folder: Path) -> list[Any]:
    """Exit code, stdout, stderr and heavy modules of each command, all in one new process."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-c", WALK],
        input=json.dumps(lines),
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_bad_input_is_one_line_and_nothing_heavy_is_imported(folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    answers = walk([line for line, _ in REFUSED], folder)
    wrong = [
        f"ccm {line}: {code} {out}{err}{heavy}"
        for (line, words), (code, out, err, heavy) in zip(REFUSED, answers, strict=True)
        if (code, out, err.count("\n"), heavy) != (2, "", 1, [])
        or not (err.startswith("error: ") and words in err)
    ]
    assert not wrong, "\n".join(wrong)
    assert sorted(folder.rglob("*")) == before, "something was left behind"


def test_what_torch_alone_knows_is_one_line_too(folder: Path) -> None:
    answers = walk([line for line, _ in LATER], folder)
    for (line, words), (code, out, err, heavy) in zip(LATER, answers, strict=True):
        assert (code, out, err.count("\n")) == (2, "", 1) and words in err, f"{line}: {err}"
        assert "torch" in heavy, "the control: this list is of those that need it"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one here")
def test_a_gpu_that_is_not_there_is_told_without_torch(folder: Path) -> None:
    commands = ("chat", "demo", "eval quick", "leaderboard", "plan --users 1 --turns 1", "serve --port 0")
    lines = [f"{command} --device cuda" for command in (*commands, "train run.yaml", "train --init model")]
    for line, (code, out, err, heavy) in zip(lines, walk(lines, folder), strict=True):
        assert (code, out, err.count("\n"), heavy) == (2, "", 1, []), f"{line}: {err} {heavy}"
        assert "device 'cuda' is not there: " in err and "give auto or cpu" in err


@pytest.mark.parametrize(
    ("built", "driver", "words"),
    [
        (set(), True, "built for processors alone"),
        ({"cuda"}, False, "no driver of NVIDIA"),
        ({"cuda"}, True, ""),
        ({"hip"}, False, ""),
        (None, False, ""),
    ],
)
def test_whether_a_gpu_can_be_here(
    built: set[str] | None, driver: bool, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not certain is left to torch."""

    def load(name: str) -> None:
        if not driver:
            raise OSError(name)

    monkeypatch.setattr(placement, "_torch_built_for", lambda: built)
    monkeypatch.setattr(placement, "ctypes", SimpleNamespace(CDLL=load))
    monkeypatch.setattr(placement, "sys", SimpleNamespace(platform="linux", modules={}))
    said = refusal(placement.check_names, device="cuda:1")
    assert words in said and bool(said) == bool(words)
    assert refusal(placement.check_names, device="mps") and not refusal(placement.check_names, device="xpu")
    monkeypatch.setattr(placement, "sys", SimpleNamespace(platform="linux", modules={"torch": torch}))
    assert not refusal(placement.check_names, device="cuda:1"), "torch is asked as soon as it is there"


def test_what_torch_was_built_for_is_read_from_its_files() -> None:
    built = {name for name in ("cuda", "hip") if getattr(torch.version, name) is not None}
    assert placement._torch_built_for() == built


def test_every_command_is_walked() -> None:
    app: Any = cli.app
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    groups = {group.name: group.typer_instance for group in app.registered_groups}
    for name, group in groups.items():
        commands |= {f"{name} {c.name or c.callback.__name__}" for c in group.registered_commands}
    walked = {line for line, _ in REFUSED}
    seldom = {"data list"}  # has no input but --json
    assert not [c for c in commands - seldom if not any(line.startswith(c) for line in walked)]


# ---------------------------------------------------------------------- methods, as their files declare them


def refusal(look: Any, *given: Any, **options: Any) -> str:
    """What an error says; empty if there is none."""
    try:
        look(*given, **options)
    except ConfigError as error:
        return str(error)
    return ""


def test_what_files_declare_is_what_is_registered() -> None:
    """The light look-up knows every method, every option and the words for its type."""
    found = known.declared()
    assert sorted(found) == list_methods()
    for name in found:
        for option in (*found[name], "nonsense"):
            for value in ("text", 3, 2.5, True, None):
                light = refusal(known._check_options, name, {option: value}, found[name])
                whole = refusal(partial(get_method, name), **{option: value})
                assert not light or light == whole, (name, option, value)
                assert light or "expected one of" in whole or "unknown option" not in whole


def test_names_that_are_written_down_are_those_that_there_are() -> None:
    assert tuple(SUITES) == cli.eval.SUITES
    assert tuple(codec.DTYPES) == settings.PRECISIONS


# ---------------------------------------------------------------------- the hub


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if HF_HUB_OFFLINE had not been set, and no hub had been asked yet."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_TRIED", {})


def test_a_hub_that_cannot_be_reached_is_tried_once(online: None, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    monkeypatch.setattr(hub, "_ask", lambda endpoint: bool(tried.append(endpoint)))
    for name in ("somebody/model", "somebody/other"):
        with pytest.raises(
            ConfigError, match=r"no model 'somebody/.*': there is no such folder, and the model hub .* cannot"
        ):
            place(name)
    with pytest.raises(ConfigError, match="cannot be reached"):
        adapter_folder.find("somebody/adapter")
    assert len(tried) == 1


def test_a_hub_that_never_answers_is_given_up(online: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A listener that takes connections and says nothing, and a look-up that hangs."""
    monkeypatch.setattr(hub, "SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        assert endpoint in hub.silent()
    monkeypatch.setattr(hub, "_TRIED", {})
    hung = threading.Event()
    monkeypatch.setattr(hub, "_ask", lambda endpoint: hung.wait(60))
    assert "cannot be reached" in hub.silent()
    hung.set()
    monkeypatch.setattr(hub, "_TRIED", {})
    monkeypatch.setattr(hub, "_ask", lambda endpoint: True)
    assert hub.silent() == "", "the control"


def test_what_was_downloaded_is_read_without_the_hub(online: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_ask", lambda endpoint: False)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file: "/there/config.json")
    assert not hub.is_online("somebody/model", "model", "config.json")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file: None)
    with pytest.raises(CCMError, match="mend the network"):
        hub.is_online("somebody/model", "model", "config.json")


@pytest.mark.parametrize("code", [404, 503])
def test_a_hub_that_answers_at_all_is_there(code: int, online: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(*_: Any, **__: Any) -> None:
        raise hub.urllib.error.HTTPError("http://x", code, "", None, None)  # type: ignore[arg-type]

    monkeypatch.setattr("urllib.request.urlopen", answer)
    assert hub.is_online("somebody/model", "model", "config.json")

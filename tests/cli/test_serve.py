"""``ccm serve`` and ``ccm key`` as commands: what they refuse, and a process from its start to its end."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import httpx
import openai
import pytest
from tiny import scramble, tiny_model, tiny_tokenizer

import ccm
from ccm import cli
from ccm.chat.messages import Message
from ccm.core.compressor import Compressor, CompressorConfig
from ccm.errors import ConfigError
from ccm.methods.default import default_memory
from ccm.serving.build import build_service
from ccm.serving.engine import Sampling
from ccm.serving.options import Options
from ccm.serving.settings import Settings
from ccm.serving.store import Limits


@pytest.mark.parametrize("command", ["serve", "key"])
def test_help(command, capsys):
    assert cli.main([command, "--help"]) == 0
    assert "Example: ccm " + command in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "open to other machines"),
        (["--host", "::"], "open to other machines"),
        (["--host", "0.0.0.0", "--api-keys", "none.txt"], "make one with: ccm key"),
        (["--host", "no such host", "--api-keys", "keys.txt"], "cannot listen"),
        (["--store", "ftp://x"], "unknown store 'ftp'"),
        (["--memory", "snapkv:token=2"], "unknown option token; did you mean tokens?"),
        (["--memory", "snapkv", "--window", "3"], "leave --window out"),
        (["--port", "70000"], "less than or equal to 65535"),
    ],
)
def test_what_is_refused_at_the_start(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["key", "alice", "--api-keys", "keys.txt"]) == 0
    assert re.fullmatch(r"ccm-\S{43}\n", capsys.readouterr().out)
    assert cli.main(["serve", "--port", "0", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_state_folder_that_cannot_be_made_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))  # root may write everywhere else
    assert cli.main(["serve", "--port", "0"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "Not a directory" in line and "give --store" in line


def test_every_option_arrives_in_its_field(monkeypatch):
    """One value of its own for every option: from the command line to the settings and the limits."""
    wanted = Options(
        store="dir:///x",
        model="m",
        memory="snapkv",
        adapter="folder/mine",
        device="cuda:1",
        dtype="float16",
        load_in="8bit",
        device_map="auto",
        decode_in="float16",
        threads=3,
        slots=5,
        sink=6,
        window=7,
        resend="refuse",
        texts=False,
        precision="int8",
        ttl=1.5,
        keep=9,
        sessions=10,
        quota=2.5,
        input_tokens=11,
        disconnect="finish",
        batch=12,
        queue=13,
        log_format="json",
        vllm="http://x",
        vllm_store="dir:///y",
        llama="m.gguf",
        llama_type="f32",
        llama_context=14,
    )
    names = {"disconnect": "on-disconnect", "texts": "no-texts"}
    arguments = []
    for field in fields(Options):
        value = getattr(wanted, field.name)
        assert value != field.default, field.name
        arguments.append(f"--{names.get(field.name, field.name).replace('_', '-')}")
        arguments += [str(value)] if value is not False else []
    got = []

    def built(options, store):
        got.append(options)
        raise ConfigError("far enough")

    monkeypatch.setattr("ccm.serving.build.build_service", built)
    monkeypatch.setattr("ccm.serving.options.Options.check", lambda self: None)  # they exclude each other
    monkeypatch.setattr("ccm.serving.store.open_store", lambda url, limits: None)
    assert cli.main(["serve", "--port", "0", *arguments]) == 2
    assert got == [wanted]
    assert wanted.limits == Limits(keep=9, marks=8, ttl=1.5 * 86400, sessions=10, nbytes=2_500_000)
    assert wanted.settings("mine") == Settings("mine", False, "refuse", "int8", 11, "finish")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with ``model`` and an ``adapter`` for it."""
    home = tmp_path_factory.mktemp("serve")
    tokenizer = tiny_tokenizer()
    tiny_model(vocab_size=len(tokenizer), max_position_embeddings=1 << 14).save_pretrained(home / "model")
    tokenizer.save_pretrained(home / "model")
    model, _ = ccm.load_model(str(home / "model"))
    scramble(Compressor(model, CompressorConfig(slots=2, rule="mean"))).save_pretrained(home / "adapter")
    return home


#: Answers that never end by themselves: their length is known.
ENDLESS = (
    "import sys; from ccm import cli; from ccm.chat import template; "
    "template.answer_ends = lambda *_: (frozenset(), ()); "
    "sys.exit(cli.main(sys.argv[1:]))"
)


@pytest.mark.parametrize(
    ("memory", "title"),
    [
        (None, "snapkv"),
        ("tova:tokens=9,window=8", "tova"),
        ("adapter", "adapter"),
        ("slots-and-words:adapter=adapter", "slots-and-words"),
    ],
)
def test_a_service_has_the_memory_that_is_asked_for(home, tmp_path, memory, title):
    if memory and memory.endswith("adapter"):
        memory = memory.removesuffix("adapter") + str(home / "adapter")
    store, model = f"sqlite://{tmp_path}/m.db", str(home / "model")
    service = build_service(Options(store=store, model=model, memory=memory, precision="float32"))
    sampling = Sampling(max_tokens=5, temperature=0)

    async def say(text):
        turn = await service.answer("t", "s", [Message("user", text)], sampling, create=True)
        return await turn.finish()

    async def talk():
        answers = [(await say(text)).text for text in said]
        return answers, (await service.view("t", "s")).stats

    said = ("my cat is Miso", "and I live in Lyon", "and I sleep at noon")
    try:
        answers, stats = asyncio.run(talk())
        assert answers[-1] and stats["slots"] > 0
        session = ccm.Session(service.method, service.tokenizer)
        assert answers == [session.generate(text, do_sample=False, max_new_tokens=5) for text in said]
        if memory is None:
            title = default_memory(service.method.reader.model)
        assert service.name.endswith(f"+{title}") and service.method.title == title
    finally:
        service.close()


@contextmanager
def process(home: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """``ccm serve`` on a free port, and its address; its log is in ``log``."""
    command = [
        sys.executable,
        "-c",
        ENDLESS,
        "serve",
        "--port",
        "0",
        "--store",
        f"sqlite://{home}/memories.db",
    ]
    model = ["--model", str(home / "model"), "--adapter", str(home / "adapter"), *arguments]
    with (home / "log").open("w") as log:
        running = subprocess.Popen([*command, *model], stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        line = running.stdout.readline() if running.stdout else ""
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert found, (home / "log").read_text()
        yield running, found[0]
    finally:
        running.kill()
        running.wait()


def ask(url: str, text: str, **options):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0, timeout=60)
    return client.chat.completions.create(
        model="ccm",
        messages=[{"role": "user", "content": text}],
        extra_headers={"X-Session-Id": "s", "X-Request-Id": "mine"},
        **options,
    )


@pytest.mark.slow
def test_from_start_to_end(home):
    with process(home) as (running, url):
        stream = ask(url, "my cat is Miso", stream=True, max_tokens=200)
        chunks = [next(stream)]
        running.send_signal(signal.SIGTERM)
        chunks += list(stream)  # the turn that runs is brought to its end
        assert chunks[-1].memory["version"] == 1 and chunks[-1].choices[0].finish_reason
        assert running.wait(30) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/healthz")
    lines = [json.loads(line) for line in (home / "log").read_text().splitlines()]
    (line,) = [line for line in lines if line["request"] == "mine"]
    assert line["status"] == 200 and line["route"] == "/v1/chat/completions" and "Miso" not in str(lines)

    with process(home, "--drain", "0", "--precision", "int8") as (running, url):  # and all is still there
        answer = ask(url, "and?", max_tokens=5)
        assert answer.memory["version"] == 2 and answer.usage.prompt_tokens_details.cached_tokens > 10
        kept = httpx.get(f"{url}/v1/memories/s").json()
        assert kept["precision"] == "int8" and 0 < kept["error"]["keys"] < 0.05
        stream = ask(url, "go on", stream=True, max_tokens=10_000)
        next(stream)
        running.send_signal(signal.SIGTERM)  # more than there is time for: nothing of it is kept
        with pytest.raises(openai.APIError, match="the server stopped during this turn"):
            list(stream)
        assert running.wait(30) == 0
    assert "Exception in ASGI application" not in (home / "log").read_text()
    with process(home) as (_, url):
        assert httpx.get(f"{url}/v1/memories/s").json()["version"] == 2

"""``ccm serve --llama`` and ``ccm chat --llama``: what they refuse, and a kill in the middle of an answer."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from conftest import SHAPE
from engine_contract import CONTEXT
from tiny import saved_folder, scramble, tiny_model

import ccm
from ccm import cli
from ccm.core.compressor import Compressor, CompressorConfig


@pytest.fixture(scope="module")
def home(tmp_path_factory, tokenizer) -> Path:
    """The model of the GGUF file in a folder, and an adapter for it."""
    home = tmp_path_factory.mktemp("serve")
    tokenizer.save_pretrained(home / "model")
    shape = {"vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT, **SHAPE}
    tiny_model(**shape).save_pretrained(home / "model")
    model, _ = ccm.load_model(str(home / "model"))
    scramble(Compressor(model, CompressorConfig(slots=2, rule="mean"))).save_pretrained(home / "adapter")
    return home


@contextmanager
def process(home: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """``ccm serve`` on a free port, and its address."""
    command = [sys.executable, "-m", "ccm", "serve", "--port", "0", "--store", f"sqlite://{home}/memories.db"]
    command += [
        "--model",
        str(home / "model"),
        "--memory",
        f"{home}/adapter:sink=2,window=16,segment=8",
        "--batch",
        "2",
    ]
    with (home / "log").open("w") as log:
        running = subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        line = running.stdout.readline() if running.stdout else ""
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert found, (home / "log").read_text()
        yield running, found[0]
    finally:
        running.kill()
        running.wait()


def ask(url: str, text: str, tokens: int, stream: bool = False) -> httpx.Request:
    body = {"model": "ccm", "messages": [{"role": "user", "content": text}], "max_tokens": tokens}
    headers = {"X-Session-Id": "s"}
    return httpx.Request(
        "POST",
        f"{url}/v1/chat/completions",
        json={**body, "temperature": 0, "stream": stream},
        headers=headers,
    )


def said(client: httpx.Client, url: str, text: str) -> str:
    answer = client.send(ask(url, text, 8)).raise_for_status().json()
    return str(answer["choices"][0]["message"]["content"])


@pytest.mark.usefixtures("runs")
def test_a_killed_server_keeps_what_it_has_acknowledged(home, gguf):
    """kill -9 in the middle of an answer; the next server, of either engine, goes on from the turn before."""
    llama = ("--llama", str(gguf), "--llama-type", "f32", "--llama-context", str(CONTEXT))
    with httpx.Client(timeout=60) as client:
        with process(home, *llama) as (running, url):
            assert said(client, url, "my cat is Miso")
            response = client.send(ask(url, "go on", 150, stream=True), stream=True)
            next(response.iter_raw())
            running.kill()
            response.close()
        with process(home, *llama) as (_, url):
            assert client.get(f"{url}/v1/memories/s").json()["version"] == 1
            client.post(f"{url}/v1/memories/s/fork", json={"id": "t"}).raise_for_status()
            first = said(client, url, "what is my cat called?")
            assert client.get(f"{url}/v1/memories/s").json()["version"] == 2
        with process(home) as (_, url):  # on transformers
            request = ask(url, "what is my cat called?", 8)
            request.headers["X-Session-Id"] = "t"
            again = client.send(request).raise_for_status().json()
            assert again["choices"][0]["message"]["content"] == first


@pytest.mark.parametrize("command", ["serve", "chat"])
def test_what_is_refused_at_the_start(command, home, gguf, tmp_path, capsys, runs):
    folder = saved_folder(tmp_path / "other")
    arguments = ["--port", "0", "--store", f"sqlite://{tmp_path}/m.db"] if command == "serve" else []
    memory = ["--memory", "streaming-llm:window=32"]
    for given, message in (
        (
            ["--llama", str(tmp_path / "none.gguf"), "--model", str(home / "model")],
            "expected a GGUF file of the model",
        ),
        (["--llama", str(gguf), "--model", folder], "give the GGUF file of that model"),
        (["--llama", str(gguf), "--llama-type", "f64"], "expected f32, f16, q8_0"),
        (["--llama", str(gguf), "--llama-context", "20"], "the memory grows to 36 positions"),
    ):
        model = [] if "--model" in given else ["--model", str(home / "model")]
        assert cli.main([command, *arguments, *memory, *model, *given]) == 2
        assert message in capsys.readouterr().err


def test_one_engine_writes_the_answers(gguf, tmp_path, capsys):
    store = f"sqlite://{tmp_path}/m.db"
    assert (
        cli.main(["serve", "--port", "0", "--store", store, "--llama", str(gguf), "--vllm", "http://x"]) == 2
    )
    assert "one of them writes the answers" in capsys.readouterr().err

"""Replicas on Ray Serve: one conversation in many places, and replicas that die (``make test-ray``)."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from rays import FAILURES, SIZES, RayServer, Talk, tiny_folder
from servers import free_port, redis_server

import ccm
from ccm import cli
from ccm.core.compressor import Compressor
from ccm.errors import ConfigError
from ccm.methods import as_method
from ccm.serving.keys import Keys
from ccm.serving.service import Message, Sampling, Service, Settings
from ccm.serving.store import open_store

pytestmark = pytest.mark.timeout(1200)  # replicas start slowly on a machine that is busy
EXAMPLE = Path(__file__).parents[2] / "examples" / "ray-serve.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("ray"))


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    with redis_server() as server:
        yield server.url


@pytest.fixture(scope="module")
def server(folder, store) -> Iterator[RayServer]:
    pytest.importorskip("ray", reason="Ray is not installed here: make test-ray")
    # to be compared with one process: another batch must not round to another float16
    exact = ("--precision", "float32", "--decode-in", "model")
    running = RayServer.start(folder, store, "--replicas", "2", "--batch", "4", "--drain", "60", *exact)
    running.wait_for_replicas(2)
    yield running
    running.stop()


def alone(folder: Path, path: Path, questions: list[str], max_tokens: int) -> list[str]:
    """The answers of one process that has the conversation to itself."""
    model, tokenizer = ccm.load_model(str(folder / "model"))
    compressor = Compressor.from_pretrained(model, str(folder / "tiny"))
    settings = Settings("tiny", precision="float32")
    service = Service(
        as_method(compressor, tokenizer, **SIZES),
        tokenizer,
        open_store(f"sqlite://{path}/alone.db"),
        settings,
    )

    async def play() -> list[str]:
        answers = []
        for question in questions:
            turn = await service.answer(
                "a",
                "s",
                [Message("user", question)],
                Sampling(max_tokens=max_tokens, temperature=0),
                create=True,
            )
            answers.append((await turn.finish()).text)
        return answers

    try:
        return asyncio.run(play())
    finally:
        service.close()


# ------------------------------------------------------------------ where a turn runs


def test_a_conversation_that_moves_between_replicas_goes_on_token_for_token(server, folder, tmp_path):
    questions, answers, places = [], [], []
    conversation = server.http.post("/v1/conversations", json={}).json()["id"]
    while len(set(places[4:])) < 2 and len(places) < 60:  # without X-Session-Id any replica may answer
        questions.append(f"Tell me of the {len(places)}th thing.")
        body = {"model": "ccm", "input": questions[-1], "conversation": conversation}
        answer = server.http.post("/v1/responses", json={**body, "temperature": 0, "max_output_tokens": 12})
        assert answer.status_code == 200, answer.text
        answers.append(answer.json()["output"][0]["content"][0]["text"])
        places.append(answer.headers["x-replica"])
    assert len(set(places)) == 2
    assert any(answers) and answers == alone(folder, tmp_path, questions, 12)


def test_a_session_stays_with_one_replica_while_it_lives(server):
    where: dict[str, set[str]] = {}
    for _ in range(3):
        for n in range(16):
            answer = server.http.get("/v1/models", headers={"X-Session-Id": f"session-{n}"})
            where.setdefault(f"session-{n}", set()).add(answer.headers["x-replica"])
    assert all(len(replicas) == 1 for replicas in where.values())
    assert len(set.union(*where.values())) == 2


def test_turns_of_one_conversation_at_the_same_time_are_taken_or_refused(server):
    conversation = server.http.post("/v1/conversations", json={}).json()["id"]
    taken: dict[str, int] = {}
    refused = []

    def ask(n: int) -> None:
        body = {
            "model": "ccm",
            "input": f"question {n}",
            "conversation": conversation,
            "max_output_tokens": 8,
        }
        answer = httpx.post(f"{server.url}/v1/responses", json=body, timeout=120)
        if answer.status_code == 200:
            taken[f"question {n}"] = answer.json()["memory"]["version"]
        else:
            refused.append((answer.status_code, answer.json()["error"]["code"]))

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) + len(refused) == 12 and taken
    assert set(refused) <= {(409, "conversation_locked"), (409, "conflict")}
    turns = server.http.get(f"/v1/memories/{conversation}").json()["turns"]
    asked = [turn["content"] for turn in turns if turn["role"] == "user"]
    assert asked == sorted(taken, key=lambda question: taken[question])


# ------------------------------------------------------------------ replicas that die


def test_a_killed_replica_loses_no_acknowledged_turn(server, folder, tmp_path):
    talks, first = [Talk(server, f"killed-{n}") for n in range(4)], server.names()
    killed, enough = threading.Event(), 4

    def chat(talk: Talk) -> None:
        after = 0
        with httpx.Client(base_url=server.url, timeout=120) as http:
            while after < enough and talk.version < 200:
                heard = talk.say(f"What of {talk.version}, {talk.session}?", http)
                after += heard and killed.is_set()

    threads = [threading.Thread(target=chat, args=(talk,)) for talk in talks]
    for thread in threads:
        thread.start()
    for _ in range(2):  # the second time the one that has taken over
        while min(len(talk.acknowledged) for talk in talks) < 2:
            threading.Event().wait(0.05)
        server.kill_replica()
        server.wait_for_replicas(2)
    killed.set()
    for thread in threads:
        thread.join()

    for talk in talks:
        assert talk.acknowledged[0].replica in first and talk.acknowledged[-1].replica not in first
        assert talk.lost() == []
        assert all(what in {str(code) for code in FAILURES} or not what.isdigit() for what in talk.failures)
        turns = server.http.get(f"/v1/memories/{talk.session}").json()["turns"]
        assert len(turns) == 2 * talk.version == 2 * (len(talk.acknowledged) + talk.unheard)
        # what the memory says is what a process that nobody killed says
        texts = [turn["content"] for turn in turns]
        assert texts[1::2] == alone(folder, tmp_path / talk.session, texts[::2], talk.max_tokens)


# ------------------------------------------------------------------ the end


def test_running_turns_end_before_the_server_does(server):
    body = {"model": "ccm", "messages": [{"role": "user", "content": "Go on."}], "temperature": 1, "seed": 3}
    headers = {"X-Session-Id": "the-last"}
    request = {**body, "stream": True, "max_tokens": 300}
    with httpx.stream(
        "POST", f"{server.url}/v1/chat/completions", json=request, headers=headers, timeout=120
    ) as answer:
        lines = (line for line in answer.iter_lines() if line.startswith("data: "))
        next(lines), next(lines)  # it is being written
        left: list[psutil.Process] = []
        ending = threading.Thread(target=lambda: left.extend(server.stop()))
        ending.start()
        rest = list(lines)
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2].removeprefix("data: "))["memory"]["version"] == 1
    ending.join()
    assert server.process.returncode == 0 and left == []


# ------------------------------------------------------------------ the deployment file


def test_the_deployment_file_serves_and_grows_with_the_load(folder, store, tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed here: make test-ray")
    yaml = pytest.importorskip("yaml")
    key = Keys.add(tmp_path / "keys.txt", "alice")
    config = yaml.safe_load(EXAMPLE.read_text())
    port = config["http_options"]["port"] = free_port()
    (application,) = config["applications"]
    given = {"store": store, "api_keys": str(tmp_path / "keys.txt"), "replicas": "1-2", "batch": 1}
    model = {"model": str(folder / "model"), "adapter": str(folder / "tiny"), **SIZES}
    application["args"] |= {**given, **model}
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(config))
    command = [str(Path(sys.executable).parent / "serve"), "run", str(tmp_path / "serve.yaml")]
    running = RayServer(command, port, tmp_path / "log", {"Authorization": f"Bearer {key}"})
    try:
        answer = running.http.post(
            "/v1/chat/completions",
            json={"model": "ccm", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3},
            headers={"X-Session-Id": "filed"},
        )
        assert answer.status_code == 200 and answer.json()["memory"]["version"] == 1
        assert httpx.get(f"{running.url}/v1/models", timeout=60).status_code == 401
        assert len(running.replicas()) == 1
        statuses, enough = set(), threading.Event()

        def load(n: int) -> None:
            body = {"model": "ccm", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 200}
            while not enough.is_set():
                headers = {"X-Session-Id": f"load-{n}", "Authorization": f"Bearer {key}"}
                answer = httpx.post(
                    f"{running.url}/v1/chat/completions", json=body, headers=headers, timeout=120
                )
                statuses.add(answer.status_code)

        threads = [threading.Thread(target=load, args=(n,)) for n in range(6)]
        for thread in threads:
            thread.start()
        try:
            running.wait_for_replicas(2)
        finally:
            enough.set()
            for thread in threads:
                thread.join()
        assert statuses == {200}
    finally:
        running.stop()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({}, "store"),
        ({"store": "redis://x"}, "api_keys"),
        ({"store": "redis://x", "nothing": 1}, "nothing"),
        ({"store": "redis://x", "batch": "many"}, "batch"),
        ({"store": "sqlite:x", "api_keys": "keys.txt"}, "share"),
        ({"store": "redis://x", "api_keys": "keys.txt", "replicas": "8-2"}, "replicas"),
    ],
)
def test_arguments_of_a_deployment_file(args, says, tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="Ray is not installed here: make test-ray")
    from ccm.serving.ray.app import build

    monkeypatch.chdir(tmp_path)
    Keys.add(tmp_path / "keys.txt", "alice")
    with pytest.raises(ConfigError, match=says):
        build(args)


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--store", "sqlite:x.db"], "replicas share their conversations"),
        (["--store", "redis://127.0.0.1:1/0", "--replicas", "none"], "a range such as 2-8"),
        (["--store", "redis://127.0.0.1:1/0", "--replicas", "0"], "a range such as 2-8"),
        (["--store", "redis://127.0.0.1:1/0"], "redis"),
        (["--host", "0.0.0.0"], "--api-keys"),
    ],
)
def test_bad_input_is_one_line(options, says, tmp_path, monkeypatch, capsys):
    pytest.importorskip("ray", reason="Ray is not installed here: make test-ray")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["serve", "--ray", "--port", "0", *options]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ") and says in err


def test_an_adapter_that_is_not_there_is_said_before_ray_starts(folder, store, capsys):
    pytest.importorskip("ray", reason="Ray is not installed here: make test-ray")
    model = ["--model", str(folder / "model"), "--adapter", str(folder / "none")]
    assert cli.main(["serve", "--ray", "--port", "0", "--store", store, *model]) == 2
    assert "no adapter" in capsys.readouterr().err.splitlines()[-1]


def test_a_cluster_that_is_not_there_is_one_line(folder, store, monkeypatch, capsys):
    pytest.importorskip("ray", reason="Ray is not installed here: make test-ray")
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    model = ["--model", str(folder / "model"), "--adapter", str(folder / "tiny")]
    assert cli.main(["serve", "--ray", "--port", "0", "--store", store, *model]) == 2
    assert "no cluster at RAY_ADDRESS" in capsys.readouterr().err.splitlines()[-1]


def test_replicas_without_ray_are_refused(capsys):
    assert cli.main(["serve", "--replicas", "2"]) == 2
    assert "give --ray" in capsys.readouterr().err


def test_without_the_package_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    for name in ("app", "run"):
        monkeypatch.delitem(sys.modules, f"ccm.serving.ray.{name}", raising=False)
        monkeypatch.delattr(f"ccm.serving.ray.{name}", raising=False)
    assert cli.main(["serve", "--ray", "--port", "0", "--store", "redis://127.0.0.1:1/0"]) == 2
    assert "pip install 'compressed-context-memory[ray]'" in capsys.readouterr().err

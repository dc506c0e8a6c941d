"""What the server refuses over HTTP: bad input, overload and strangers."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
import time
from contextlib import suppress

import httpx
import openai
import pytest
from asking import ask, respond, user
from services import MODEL, serving, tiny_service

from ccm.errors import ConfigError, StorageError
from ccm.serving.api import HttpLimits
from ccm.serving.api.stream import EventStream
from ccm.serving.keys import Keys
from ccm.serving.logs import JsonLines
from ccm.serving.service import Message, Sampling
from ccm.serving.store import Limits

pytest_plugins = ("api_fixtures",)


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b"{", 400, "invalid_json"),
        (b"\xff\xfe{}", 400, "invalid_json"),
        (b'{"model": "\xff"}', 400, "invalid_json"),
        (b'{"model": 1e5' + b"0" * 5000 + b"}", 400, "invalid_value"),
        (b'{"seed": ' + b"9" * 5000 + b"}", 400, "invalid_json"),
        (b"[]", 400, "invalid_value"),
        (b"", 400, "invalid_value"),
        (b"[" * 100_000, 400, "invalid_json"),
    ],
)
def test_bodies_that_are_no_json(http, content, status, code):
    answer = http.post("/v1/chat/completions", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == status
    assert code is None or answer.json()["error"]["code"] == code
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_errors_say_what_to_do(http):
    body = {"model": MODEL, "messages": user("hi")}
    answer = http.post(
        "/v1/chat/completions", content=json.dumps(body), headers={"Content-Type": "text/plain"}
    )
    assert answer.status_code == 400 and "Content-Type: application/json" in answer.json()["error"]["message"]
    answer = http.post("/v1/chat/completions", json={**body, "messages": [{"role": "user", "content": 5}]})
    assert answer.json()["error"]["param"] == "messages[0].content"
    for path, sent, name in (
        ("chat/completions", {"model": MODEL, "messages": []}, "messages"),
        ("responses", {"model": MODEL, "input": []}, "input"),
        ("conversations/any/items", {"items": []}, "items"),
    ):
        error = http.post(f"/v1/{path}", json=sent).json()["error"]
        assert error["param"] == name and error["message"].startswith(f"{name}: got "), error
        assert "expected" in error["message"] and "send what" in error["message"], error
    answer = http.post("/v1/chat/completions", json={**body, "X-y": 5})
    assert answer.json()["error"]["message"] == "X-y is not supported: leave the field out"
    answer = http.post("/v1/chat/completions", json=body, headers={"X-Session-Id": "a b"})
    assert "without blanks" in answer.json()["error"]["message"]


def test_addresses_that_are_not_there(http):
    for method, path, status in (
        ("GET", "/v1/none", 404),
        ("GET", "/v1/chat/completions", 405),
        ("GET", "/v1/models/none", 404),
        ("GET", "/page/../../secret", 404),
        ("GET", "/page/none.js", 404),
        ("GET", "/v1/memories/none", 404),
        ("POST", "/v1/memories/none/fork", 404),
        ("GET", "/v1/memories/" + "x" * 201, 400),
        ("GET", "/v1/memories?limit=0", 400),
    ):
        answer = http.request(method, path)
        assert (answer.status_code, bool(answer.json()["error"]["message"])) == (status, True), path


@pytest.mark.parametrize("name", ["a b", "a/b", "a?b", "x" * 201, "a%2fb", ".", "..", b"\xc3\xa9"])
def test_session_headers_that_are_no_ids(http, name):
    body = {"model": MODEL, "messages": user("hi")}
    answer = http.post("/v1/chat/completions", json=body, headers={"X-Session-Id": name})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "x-session-id"


def test_a_name_in_a_header_is_ascii_and_the_refusal_says_so(http):
    """HTTP gives a header's bytes no encoding, so the name that is right in a path is none in a header."""
    body = {"model": MODEL, "messages": user("a")}
    answer = http.post("/v1/chat/completions", json=body, headers={"X-Session-Id": "Zoë".encode()})
    assert answer.status_code == 400 and "in a header ASCII alone" in answer.json()["error"]["message"]


def test_two_writers_on_one_conversation(server, client):
    stream = ask(client, "go on", "locked", stream=True, max_tokens=200)
    next(iter(stream))
    with pytest.raises(openai.ConflictError) as caught:
        ask(client, "me too", "locked")
    assert caught.value.code == "conversation_locked"
    stream.close()


def test_a_client_that_goes_away_commits_nothing(server, client, http, monkeypatch):
    monkeypatch.setattr(server.service.engine, "_ends", set())  # answers of known length
    stream = ask(client, "go on", "left", stream=True, max_tokens=400)
    next(iter(stream))
    stream.close()
    cancelled = server.service.metrics.cancelled
    before = cancelled._value.get()
    body = {"model": MODEL, "messages": user("go on"), "max_tokens": 400}
    with pytest.raises(httpx.ReadTimeout):  # and one that waits for a whole answer
        http.post("/v1/chat/completions", json=body, headers={"X-Session-Id": "left-2"}, timeout=0.1)
    deadline = time.monotonic() + 20
    while cancelled._value.get() < before + 1 or server.service.running.turns:
        assert time.monotonic() < deadline, "the turns are still running"
        time.sleep(0.02)
    assert http.get("/v1/memories/left").status_code == 404
    assert http.get("/v1/memories/left-2").status_code == 404
    assert ask(client, "hi", "left").memory["version"] == 1


def test_a_client_that_goes_before_the_stream_begins_frees_the_conversation(server):
    """The generator of events has not run then, and closes nothing by itself."""

    async def run():
        turn = await server.service.answer(
            "local", "early", [Message("user", "go on")], Sampling(), create=True
        )
        begun = []

        async def events():
            begun.append(1)
            yield ""

        async def receive():
            return {"type": "http.disconnect"}

        async def send(message):
            await asyncio.Event().wait()  # a connection that takes nothing

        await asyncio.wait_for(EventStream(events(), turn)({}, receive, send), 20)
        assert not begun

    asyncio.run(run())
    assert not server.service.running.turns and ("local", "early") not in server.service.running.locked


def test_an_error_in_mid_stream_is_told(server, client, monkeypatch, caplog):
    def broken(*args):
        raise StorageError("/secret/place: the disk is full")

    monkeypatch.setattr(server.service.store, "commit", broken)
    with pytest.raises(openai.APIError, match="the store failed; the server's log says why"):
        list(ask(client, "x", "unlucky", stream=True))
    with pytest.raises(openai.InternalServerError, match="the store failed") as caught:
        ask(client, "x", "unlucky-2")
    assert caught.value.status_code == 503 and "Retry-After" in caught.value.response.headers
    assert "secret" not in caught.value.response.text and caplog.text.count("/secret/place: the disk") == 2


def test_overload_and_limits(tmp_path):
    service = tiny_service(tmp_path, waiting=0, limits=Limits(sessions=1))
    go_on = threading.Event()  # no answer ends before the next request is there
    service.method.reader.model.register_forward_pre_hook(lambda *_: go_on.wait(30) and None)
    with serving(service, limits=HttpLimits(body=2000, seconds=0.5)) as running:
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="-", max_retries=0)
        streams = [ask(client, "go on", stream=True, max_tokens=400, temperature=1.9) for _ in range(4)]
        with pytest.raises(openai.RateLimitError) as caught:
            ask(client, "x")
        assert int(caught.value.response.headers["Retry-After"]) >= 1
        go_on.set()
        for stream in streams:
            stream.close()
        with pytest.raises(openai.APIStatusError) as caught:
            ask(client, "x" * 3000)
        assert caught.value.status_code == 413
        chunked = httpx.post(f"{running.url}/v1/responses", content=iter([b"x" * 1500] * 2))
        assert chunked.status_code == 413
        deadline = time.monotonic() + 20
        while service.running.turns:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        ask(client, "x", "one")
        with pytest.raises(openai.PermissionDeniedError) as caught:
            ask(client, "x", "two")
        assert caught.value.code == "insufficient_quota"
        host, port = running.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as slow:  # a body that never comes
            slow.sendall(b"POST /v1/responses HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\nx")
            assert b"408" in slow.recv(1000)


@pytest.fixture(scope="module")
def locked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    keys = {name: Keys.add(folder / "keys.txt", name) for name in ("alice", "bob")}
    with serving(tiny_service(folder), Keys.read(folder / "keys.txt")) as running:
        yield running, keys


def test_tenants_come_from_keys_alone(locked):
    running, keys = locked
    alice, bob = (openai.OpenAI(base_url=f"{running.url}/v1", api_key=keys[n], max_retries=0) for n in keys)
    assert ask(alice, "mine", "same-name").memory["version"] == 1
    with httpx.Client(base_url=running.url, headers={"Authorization": f"Bearer {keys['bob']}"}) as http:
        for method, path in (
            ("GET", "/v1/memories/same-name"),
            ("DELETE", "/v1/memories/same-name"),
            ("GET", "/v1/memories/same-name/export"),
            ("POST", "/v1/memories/same-name/fork"),
            ("GET", "/v1/conversations/same-name/items"),
        ):
            foreign = http.request(method, path)
            unknown = http.request(method, path.replace("same-name", "no-such"))
            assert foreign.status_code == unknown.status_code == 404
            assert foreign.text.replace("same-name", "no-such") == unknown.text  # not to be told apart
        assert http.get("/v1/memories").json()["data"] == []
    with pytest.raises(openai.NotFoundError):
        respond(bob, "x", previous_response_id="resp_same-name.1")
    assert ask(bob, "mine", "same-name").memory["version"] == 1
    assert ask(alice, "and", "same-name").memory["version"] == 2


def test_a_stranger_is_refused_before_his_body_is_read(locked):
    running, keys = locked
    host, port = running.url.removeprefix("http://").split(":")
    head = "POST /v1/memories/import HTTP/1.1\r\nHost: x\r\nContent-Length: 200000000\r\n{}\r\n"
    for key, expected in (("", b" 401 "), (f"Authorization: Bearer {keys['bob']}\r\n", b"")):
        with socket.create_connection((host, int(port)), timeout=0.5) as stranger:
            stranger.sendall(head.format(key).encode() + b"x")
            answer = b""
            with suppress(TimeoutError):  # with a key the server waits for the rest
                answer = stranger.recv(1000)
            assert expected in answer and bool(expected) == bool(answer)


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer", "Basic abc", "ccm-x"])
def test_no_key_no_entry(locked, header):
    running, _ = locked
    headers = {"Authorization": header} if header else {}
    with httpx.Client(base_url=running.url, headers=headers) as http:
        for path in ("/v1/models", "/v1/memories", "/metrics"):
            answer = http.get(path)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        assert http.get("/healthz").status_code == 200 and http.get("/readyz").status_code == 200


def test_pages_of_other_sites_are_kept_out(http, locked):
    for headers in ({"Host": "evil.example"}, {"Origin": "https://evil.example"}, {"Origin": "null"}):
        assert http.get("/v1/memories", headers=headers).status_code == 403
    assert http.get("/v1/memories", headers={"Origin": str(http.base_url).rstrip("/")}).status_code == 200
    running, keys = locked  # with keys there is nothing that a page could do without one
    headers = {"Host": "ccm.example", "Authorization": f"Bearer {keys['bob']}"}
    assert httpx.get(f"{running.url}/v1/models", headers=headers).status_code == 200


def test_key_files(tmp_path):
    path = tmp_path / "keys.txt"
    key = Keys.add(path, "alice")
    assert path.stat().st_mode & 0o777 == 0o600 and key not in path.read_text()
    assert Keys.read(path).tenant(key) == "alice" and Keys.read(path).tenant(key + "x") is None
    second = Keys.add(path, "alice")
    assert {Keys.read(path).tenant(k) for k in (key, second)} == {"alice"}
    with pytest.raises(ConfigError, match="tenant"):
        Keys.add(path, "a b")
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        Keys.read(path)
    path.chmod(0o600)
    path.write_text("alice:123\n")
    with pytest.raises(ConfigError, match="line 1"):
        Keys.read(path)
    path.write_text("# nothing\n")
    with pytest.raises(ConfigError, match="no key"):
        Keys.read(path)
    with pytest.raises(ConfigError, match="ccm key"):
        Keys.read(tmp_path / "none")


def test_requests_have_ids_and_logs_no_secrets(locked, caplog, monkeypatch):
    running, keys = locked
    caplog.set_level(logging.INFO, "ccm.access")
    caplog.handler.setFormatter(JsonLines())
    headers = {
        "Authorization": f"Bearer {keys['alice']}",
        "X-Request-Id": "mine-1",
        "X-Session-Id": "secret-session",
    }
    body = {"model": MODEL, "messages": user("a secret text"), "max_tokens": 3}
    answer = httpx.post(f"{running.url}/v1/chat/completions", json=body, headers=headers)
    assert answer.headers["X-Request-Id"] == "mine-1"
    forged = httpx.get(f"{running.url}/healthz", headers={"X-Request-Id": "two words"})
    assert forged.headers["X-Request-Id"].startswith("req_")
    with monkeypatch.context() as patch:
        patch.setattr(running.service.store, "latest", lambda *_: 1 / 0)
        failed = httpx.post(f"{running.url}/v1/chat/completions", json=body, headers=headers)
    assert failed.status_code == 500 and "ZeroDivision" not in failed.text
    lines = [json.loads(line) for line in caplog.text.splitlines()]
    error = next(line for line in lines if line["level"] == "error")
    assert error["request"] == "mine-1" and "ZeroDivisionError" in error["error"]
    line = next(line for line in lines if line["request"] == "mine-1")
    assert (line["tenant"], line["status"], line["route"]) == ("alice", 200, "/v1/chat/completions")
    for secret in (keys["alice"], "secret-session", "a secret text"):
        assert secret not in caplog.text


def test_security_headers(http):
    headers = http.get("/").headers
    assert "default-src 'self'" in headers["Content-Security-Policy"] and headers["X-Frame-Options"] == "DENY"
    assert http.get("/v1/none").headers["X-Content-Type-Options"] == "nosniff"

"""What whoever runs a server sees and does: a log that can be read, and keys that come and go while it runs."""

from __future__ import annotations

import json
import logging
import sys

import httpx
import pytest
from services import MODEL, serving, tiny_service

from ccm.serving.keys import KeyFile, Keys
from ccm.serving.logs import JsonLines, Words, request_id, to_stderr


def test_keys_are_read_again_when_their_file_changes(tmp_path, caplog):
    path = tmp_path / "keys.txt"
    first = Keys.add(path, "alice")
    with (
        serving(tiny_service(tmp_path), KeyFile(path)) as running,
        httpx.Client(base_url=running.url) as http,
    ):

        def status(key: str) -> int:
            return http.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code

        assert (status(first), status("ccm-other")) == (200, 401)
        second = Keys.add(path, "bob")  # as ccm key does it
        assert (status(first), status(second)) == (200, 200)
        path.write_text("".join(line for line in path.read_text().splitlines(True) if "bob" in line))
        assert (status(first), status(second)) == (401, 200), "a line that is gone is a key taken back"
        good = path.read_text()
        for broken in ("# nobody\n", "bob:123\n"):
            path.write_text(broken)
            assert [status(second) for _ in range(2)] == [401, 401]
        assert caplog.text.count("nobody is let in") == 2, "once for each change"
        path.write_text(good)
        assert status(second) == 200
        path.unlink()
        assert status(second) == 401


def test_keys_that_were_read_once_stay_as_they_are(tmp_path):
    """The control: what a replica on another machine has."""
    path = tmp_path / "keys.txt"
    key = Keys.add(path, "alice")
    keys = Keys.read(path)
    path.write_text("# nobody\n")
    assert keys.tenant(key) == "alice"


@pytest.mark.parametrize(
    ("log_format", "terminal", "kind"),
    [
        ("auto", True, Words),
        ("auto", False, JsonLines),
        ("text", False, Words),
        ("json", True, JsonLines),
    ],
)
def test_the_log_is_for_whoever_reads_it(log_format, terminal, kind, monkeypatch):
    root = logging.getLogger()
    before, level = list(root.handlers), logging.getLogger("ccm.access").level
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    try:
        to_stderr(log_format)
        assert isinstance(root.handlers[0].formatter, kind)
    finally:
        root.handlers[:] = before
        logging.getLogger("ccm.access").setLevel(level)


def test_a_line_in_words_says_what_one_in_json_says():
    record = logging.LogRecord("ccm.access", logging.INFO, "", 0, "POST /v1/responses 200", (), None)
    record.fields = {"tenant": "alice", "seconds": 0.456, "status": 200}
    token = request_id.set("req_1")
    try:
        assert Words().format(record)[8:] == " POST /v1/responses 200 0.46 s alice (req_1)"
        assert json.loads(JsonLines().format(record))["tenant"] == "alice"
        record.levelno, record.levelname = logging.ERROR, "ERROR"
        assert " ERROR: POST" in Words().format(record)
    finally:
        request_id.reset(token)


def test_a_request_without_a_conversation_is_said_once_a_tenant(tmp_path, caplog):
    """A client that names its conversations in another way forgets, and its operator sees why."""
    keys = {name: Keys.add(tmp_path / "keys.txt", name) for name in ("alice", "bob")}
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}

    def said() -> list[str]:
        return [line.getMessage() for line in caplog.records if "names no conversation" in line.getMessage()]

    with serving(tiny_service(tmp_path), Keys.read(tmp_path / "keys.txt")) as running:

        def ask(tenant, headers=(), **more):
            key = {"Authorization": f"Bearer {keys[tenant]}"}
            url = f"{running.url}/v1/chat/completions"
            answer = httpx.post(url, json={**body, **more}, headers={**key, **dict(headers)}, timeout=60)
            assert answer.status_code == 200

        ask("alice", {"X-Session-Id": "a"}, user="secret-user")
        ask("alice", {"X-CCM-Ephemeral": "true"})
        assert not said(), "these know what they do"
        ask("alice", user="secret-user")
        ask("alice")
        ask("bob")
    of_alice, of_bob = said()
    assert "alice names no conversation (its field user does not)" in of_alice and "secret" not in of_alice
    assert "bob names no conversation, so it is answered" in of_bob
    assert all("header X-Session-Id" in line and "docs/clients.md" in line for line in (of_alice, of_bob))

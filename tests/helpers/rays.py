"""``ccm serve --ray`` as a process, with replicas that can be killed, and what its clients were told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from servers import free_port
from tiny import scramble, tiny_model, tiny_tokenizer

from ccm.core.compressor import Compressor, CompressorConfig

#: What a client may see while a replica dies, beside an answer.
FAILURES = (500, 503)
SIZES = {"sink": 2, "window": 16}
_REPLICA = "ray::ServeReplica:"


def tiny_folder(folder: Path) -> Path:
    """A folder with a tiny ``model`` and an adapter ``tiny`` for it."""
    tokenizer = tiny_tokenizer()
    settings = {"vocab_size": len(tokenizer), "max_position_embeddings": 512}
    tiny_model(**settings).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    config = CompressorConfig(slots=2, rule="mean")
    scramble(Compressor(tiny_model(**settings), config)).save_pretrained(folder / "tiny")
    return folder


class RayServer:
    """A process of ``ccm serve --ray``, or another command that serves the same on ``port``."""

    def __init__(self, command: Sequence[str], port: int, log: Path, headers: dict[str, str] | None = None):
        self.url, self.log = f"http://127.0.0.1:{port}", log
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        environment |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_raylet_start_wait_time_s": "120"}
        environment.pop("RAY_ADDRESS", None)
        with log.open("wb") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
        self.http = httpx.Client(base_url=self.url, timeout=120, headers=headers)
        self.wait_until_ready()

    @classmethod
    def start(cls, folder: Path, store: str, *options: str, model: Sequence[str] | None = None) -> RayServer:
        """``ccm serve --ray`` with the tiny model of :func:`tiny_folder`, or with other options for a model."""
        port = free_port()
        chosen = model or ["--model", str(folder / "model"), "--adapter", str(folder / "tiny")]
        sizes = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]
        command = [sys.executable, "-m", "ccm", "serve", "--ray", "--port", str(port), "--store", store]
        return cls([*command, *chosen, *sizes, *options], port, folder / "log")

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + 300
        while True:
            with suppress(httpx.TransportError):
                if self.http.get("/readyz").status_code == 200:
                    return
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                raise RuntimeError(f"the server did not start:\n{self.log.read_text()[-4000:]}")
            time.sleep(0.2)

    def replicas(self) -> list[psutil.Process]:
        """Processes of the replicas, the oldest first."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if process.cmdline()[:1] and process.cmdline()[0].startswith(_REPLICA):
                    found.append(process)
            except psutil.Error:  # it has just ended
                continue
        return sorted(found, key=lambda process: process.create_time())

    def kill_replica(self) -> None:
        """kill -9 of the oldest one."""
        self.replicas()[0].kill()

    def names(self) -> set[str]:
        """Replicas that answer."""
        found = set()
        for _ in range(24):
            with suppress(httpx.TransportError):
                found.add(self.http.get("/healthz").headers.get("x-replica"))
        return found - {None}

    def wait_for_replicas(self, count: int) -> None:
        deadline = time.monotonic() + 300
        while len(self.replicas()) != count or len(self.names()) != count:
            if time.monotonic() > deadline:
                raise RuntimeError(f"there are not {count} replicas:\n{self.log.read_text()[-4000:]}")
            time.sleep(0.5)

    def stop(self) -> list[psutil.Process]:
        """SIGTERM; returns the processes that it has left behind."""
        self.http.close()
        started = []
        if self.process.poll() is None:
            started = psutil.Process(self.process.pid).children(recursive=True)
            self.process.send_signal(signal.SIGTERM)
        self.process.wait(120)
        return psutil.wait_procs(started, timeout=30)[1]


@dataclass
class Said:
    """An acknowledged turn."""

    version: int
    question: str
    answer: str
    replica: str


@dataclass
class Talk:
    """A client with one conversation, who goes on whatever happens, and never sends a committed turn again.

    Attributes:
        acknowledged: turns whose answer arrived.
        failures: what it got instead, and how often; after each it looks which version the conversation has.
        unheard: turns that were committed although their answer did not arrive.
    """

    server: RayServer
    session: str
    max_tokens: int = 12
    acknowledged: list[Said] = field(default_factory=list)
    failures: dict[str, int] = field(default_factory=dict)
    unheard: int = 0
    version: int = 0

    def say(self, text: str, http: httpx.Client) -> bool:
        """One turn; true if it was acknowledged."""
        body: dict[str, Any] = {
            "model": "ccm",
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }
        try:
            answer = http.post("/v1/chat/completions", json=body, headers={"X-Session-Id": self.session})
        except httpx.TransportError as error:
            self._failed(type(error).__name__)
        else:
            if answer.status_code == 200:
                said = answer.json()
                self.version = said["memory"]["version"]
                content = said["choices"][0]["message"]["content"]
                self.acknowledged.append(Said(self.version, text, content, answer.headers["x-replica"]))
                return True
            self._failed(str(answer.status_code))
        known = self._look(http)
        if known > self.version:
            self.unheard += 1
        self.version = known
        return False

    def _failed(self, what: str) -> None:
        self.failures[what] = self.failures.get(what, 0) + 1

    def _look(self, http: httpx.Client) -> int:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with suppress(httpx.TransportError):
                seen = http.get(f"/v1/memories/{self.session}")
                if seen.status_code == 200:
                    return int(seen.json()["version"])
                if seen.status_code == 404 and "error" in seen.text:
                    return 0
            time.sleep(0.2)
        raise RuntimeError("the server did not come back")

    def lost(self) -> list[Said]:
        """Acknowledged turns that the conversation does not hold, at the place of their version."""
        texts = [
            turn["content"] for turn in self.server.http.get(f"/v1/memories/{self.session}").json()["turns"]
        ]
        return [
            said
            for said in self.acknowledged
            if texts[2 * said.version - 2 : 2 * said.version] != [said.question, said.answer]
        ]

"""``vllm serve`` over HTTP: tokens in, tokens out."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from threading import Lock
from typing import Any
from urllib.parse import urlsplit

from ...errors import ConfigError
from ..engine.base import EngineError, OverloadedError
from .reference import Reference, check_version


class Call:
    """A request that another thread may end: its connection is cut, and vLLM drops what it was doing."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._socket: socket.socket | None = None
        self.closed = False

    def uses(self, connection: socket.socket) -> None:
        """Remember the connection, to cut it if the call is closed."""
        with self._lock:
            self._socket = connection
            if self.closed:
                self._cut()

    def close(self) -> None:
        """Cut the connection: vLLM ends the request."""
        with self._lock:
            self.closed = True
            self._cut()

    def _cut(self) -> None:
        if self._socket is not None:
            with suppress(OSError):  # it has ended by itself
                self._socket.shutdown(socket.SHUT_RDWR)


class VllmServer:
    """One ``vllm serve``, or a router in front of several.

    Args:
        url: http://host:port
        key: its ``--api-key``.
        timeout: seconds without a token after which a request has failed.

    Attributes:
        model: as it calls it.
        context: its ``--max-model-len``.

    Raises:
        EngineError: it is not reachable.
        ConfigError: no usable URL, or a release of vLLM that is not supported.
    """

    def __init__(self, url: str, key: str | None = None, timeout: float = 600):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"vLLM: got {url!r}, expected a URL such as http://127.0.0.1:8000")
        self.url, self.timeout = url.rstrip("/"), timeout
        self._headers = {"Content-Type": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        self._parts = parts
        check_version(str(self._get("/version").get("version")))
        (card, *_) = self._get("/v1/models")["data"]
        self.model, self.context = str(card["id"]), int(card["max_model_len"])

    def tokens(
        self, prompt: list[int], reference: Reference | None, options: dict[str, Any], call: Call
    ) -> Iterator[list[int]]:
        """Token ids of the answer, as they come.

        Args:
            prompt: token ids behind the memory, at least one.
            reference: the memory; None: there is none.
            options: of ``/v1/completions``.
            call: what another thread can end it by; then the iteration ends.

        Raises:
            ConfigError: vLLM refuses the request.
            OverloadedError: it has too much to do.
            EngineError: it failed on it, or is not reachable.
        """
        body = {"model": self.model, "prompt": prompt, "stream": True, "return_token_ids": True, **options}
        if reference is not None:
            # a token that the prompt has anyway, so that a repetition penalty is the same without placeholders
            body["prompt"] = prompt[:1] * reference.length + prompt
            body |= {"cache_salt": reference.salt, "kv_transfer_params": reference.params()}
        try:
            response = self._request("POST", "/v1/completions", body, call)
            for line in response:
                if not line.startswith(b"data: "):
                    continue
                data = line.removeprefix(b"data: ").strip()
                if data == b"[DONE]":
                    return
                event = json.loads(data)
                if "error" in event:
                    raise self._failed(str(event["error"].get("message")))
                yield event["choices"][0].get("token_ids") or []
            raise HTTPException("the connection ended")
        except (OSError, HTTPException, ValueError) as error:
            if call.closed:
                return
            if isinstance(error, ConfigError | OverloadedError):
                raise
            raise EngineError(f"vLLM at {self.url} was lost during the answer: {error}") from error

    def _get(self, path: str) -> Any:
        try:
            return json.loads(self._request("GET", path, None, Call()).read())
        except (OSError, HTTPException, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise EngineError(f"vLLM at {self.url} is not reachable: {error}") from error

    def _request(self, method: str, path: str, body: dict[str, Any] | None, call: Call) -> HTTPResponse:
        kind = HTTPSConnection if self._parts.scheme == "https" else HTTPConnection
        connection = kind(str(self._parts.hostname), self._parts.port, timeout=self.timeout)
        connection.connect()
        call.uses(connection.sock)
        data = None if body is None else json.dumps(body)
        connection.request(method, self._parts.path.rstrip("/") + path, data, self._headers)
        response = connection.getresponse()
        if response.status == 200:
            return response
        try:
            message = str(json.loads(response.read())["error"]["message"])
        except (ValueError, KeyError, TypeError):
            message = response.reason
        if response.status in (400, 401, 404, 422):
            raise ConfigError(f"vLLM at {self.url} refuses the request: {message}")
        if response.status in (429, 503):
            raise OverloadedError(f"vLLM at {self.url} takes no more requests: {message}", 5)
        raise self._failed(message)

    def _failed(self, message: str) -> EngineError:
        return EngineError(f"vLLM at {self.url} failed on this turn: {message}; its log says why")

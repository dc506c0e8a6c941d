"""Hooks of schemathesis: every other id in an address is that of a conversation that is there."""

from __future__ import annotations

import itertools
import os
from typing import Any

import httpx
import schemathesis

URL = os.environ["CCM_TESTED_URL"]
_numbers = itertools.count()


@schemathesis.hook
def map_path_parameters(context: Any, path_parameters: dict[str, Any]) -> dict[str, Any]:
    number = next(_numbers)
    if not path_parameters or "session" not in path_parameters or number % 2:
        return path_parameters
    name = f"there-{number % 8}"
    if httpx.get(f"{URL}/v1/memories/{name}").status_code == 404:  # not yet, or deleted by a test
        message = {"model": "ccm", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
        headers = {"X-Session-Id": name}
        httpx.post(f"{URL}/v1/chat/completions", json=message, headers=headers, timeout=60)
    return {**path_parameters, "session": name}

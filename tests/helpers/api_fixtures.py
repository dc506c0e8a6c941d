"""Fixtures of tests that talk to a server over HTTP: a module names this file in ``pytest_plugins``."""

from __future__ import annotations

import httpx
import openai
import pytest
from services import serving, tiny_service


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tiny_service(tmp_path_factory.mktemp("store"))) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client

"""Memories for tests, in a store and as vLLM is asked for them."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

import torch

from ccm.serving.store import Snapshot, Store, codec
from ccm.serving.vllm.client import Call, VllmServer
from ccm.serving.vllm.reference import Reference

GREEDY = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
PROMPT = [5, 77, 8, 41]


def ids(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 250, (count,), generator=generator).tolist()


def memory_of(compressor: Any, segments: list[int], seed: int = 0, **sizes: int) -> Any:
    """After segments of these lengths."""
    memory = None
    for index, length in enumerate(segments):
        memory = compressor.compress([ids(length, seed * 100 + index)], memory, **sizes)
    return memory


def put(store: Store, memory: Any, tenant: str = "alice") -> Reference:
    session = store.create(tenant)
    payload, metadata = codec.encode(memory)
    stored = store.commit(tenant, session, 0, Snapshot(payload, metadata))
    return Reference(tenant, session, stored.version, memory.length)


def answer(
    server: VllmServer, reference: Reference | None, prompt: list[int] = PROMPT, **options: Any
) -> list[int]:
    """Token ids from vLLM."""
    parts = server.tokens(prompt, reference, {**GREEDY, **options}, Call())
    return [token for part in parts for token in part]


def post(url: str, body: dict[str, Any]) -> int:
    """The status of a request that is not streamed."""
    data = json.dumps(body).encode()
    request = urllib.request.Request(f"{url}/v1/completions", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def expected(compressor: Any, memory: Any, prompt: list[int] = PROMPT, count: int = 12) -> list[int]:
    """Token ids from transformers."""
    out = compressor.generate([prompt], memory, max_new_tokens=count, do_sample=False, eos_token_id=None)
    return out[0, len(prompt) :].tolist()

"""Short measurements on this machine: reading text and taking it in, and committing a memory to a store."""

from __future__ import annotations

import secrets
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import DynamicCache

from ..core.memory import KV, Memory, Row
from ..core.room import CACHE
from ..errors import ConfigError
from ..methods import Method
from ..methods.base import segments_of
from ..methods.bits.packed import Packed
from ..methods.spec import Spec
from ..models.load import random_model
from ..serving.store import Snapshot, open_store
from ..serving.store.paths import url_of
from .sizes import Held, Shape, planned

#: Tokens that are prefilled at once.
PREFILL = 256
_REPEATS = 5
_TENANT = "ccm-plan"


@dataclass(frozen=True)
class Speed:
    """Median seconds per token, and where they were measured.

    Attributes:
        prefill: the plain model reads :data:`PREFILL` tokens (or as many as its context has) at once.
        fold: a turn is taken in by a memory, read and folded, with the passes that a server makes.
        share: of that, in seconds of a prefill of the same turn over the same entries (median of pairs).
        where: device and threads.
    """

    prefill: float
    fold: float
    share: float
    where: str


@torch.inference_mode()
def speed(
    model_config: Any,
    shape: Shape,
    spec: Spec,
    held: Held,
    tokens: int,
    device: torch.device,
) -> Speed:
    """Time a model of this shape with random weights, which is as fast as one with trained ones.

    Args:
        model_config: of transformers.
        shape: of the same model.
        spec: the memory.
        held: what a turn is folded into.
        tokens: of the turn; at most :data:`PREFILL` are timed.
        device: where.

    Raises:
        ConfigError: the model does not fit into the free memory.
    """
    on_cuda = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if on_cuda else psutil.virtual_memory().available
    needed = int(1.2 * (shape.weight_bytes + 4 * held.nbytes(shape)))
    if needed > free:
        raise ConfigError(
            f"measuring needs {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} are free: plan with --no-measure"
        )
    model = random_model(model_config, device)
    words, longest = model_config.vocab_size, min(PREFILL, shape.context)
    ids = torch.randint(words, (1, longest), device=device)

    def prefill() -> None:
        model.base_model(input_ids=ids, use_cache=True, **{CACHE: DynamicCache()})

    (reading,) = _times(device, prefill)
    method = planned(spec, model)
    memory = _memory(method, shape, held)
    segment = tuple(ids[0, : method.longest].tolist())
    room = max(0, min(method.window, shape.context // 2) - held.window)
    for _ in range(room // method.longest):  # from here on every segment pushes one out
        memory = method.fold(memory, [segment])
    turn = ids[:, : min(tokens, longest)]
    segments = segments_of(turn[0].tolist(), method.longest)

    def take_in() -> None:
        after, left = memory, segments
        while left:
            count = method.portion(after.length, left)
            after, left = method.take_in(after, [left[:count]]), left[count:]

    def plainly() -> None:
        _, call = method.reader.live(method.recall(memory)).ahead(torch.ones_like(turn, dtype=torch.bool))
        method.reader.body(input_ids=turn, **call)

    folding, plain = _times(device, take_in, plainly)
    share = statistics.median(a / b for a, b in zip(folding, plain, strict=True))
    name = f"{torch.get_num_threads()} CPU threads" if device.type == "cpu" else str(device)
    where = torch.cuda.get_device_name(device) if on_cuda else name
    each = statistics.median(reading) / longest, statistics.median(folding) / turn.shape[1]
    return Speed(*each, share, where)


@dataclass(frozen=True)
class Writing:
    """Median seconds of a commit, and the store."""

    seconds: float
    where: str


def writing(url: str | None, nbytes: int) -> Writing:
    """Commit memories of so many bytes, one after the other, to a session made for this and deleted again.

    Args:
        url: of the store; None takes a SQLite file in the folder for temporary files.
        nbytes: of each.

    Raises:
        ConfigError, StorageError, UnknownNameError, MissingPackageError: as for :func:`open_store`.
    """
    with tempfile.TemporaryDirectory() as folder:
        # the URL may hold a password, its scheme does not
        where = "a temporary SQLite file" if url is None else f"the {url.partition(':')[0]} store"
        with open_store(url or url_of("sqlite", Path(folder) / "plan.db")) as store:
            session = store.create(_TENANT)
            try:
                payload, times = secrets.token_bytes(nbytes), []
                for version in range(1 + _REPEATS):
                    began = time.perf_counter()
                    store.commit(_TENANT, session, version, Snapshot(payload, {}))
                    times.append(time.perf_counter() - began)
            finally:
                store.delete(_TENANT, session)
    return Writing(statistics.median(times[1:]), where)


def _times(device: torch.device, *calls: Callable[[], None]) -> list[list[float]]:
    """Seconds of each call, which are run in turns."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(1 + _REPEATS):
        for call, own in zip(calls, times, strict=True):
            began = time.perf_counter()
            call()
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            own.append(time.perf_counter() - began)
    return [own[1:] for own in times]


def _memory(method: Method, shape: Shape, held: Held) -> Memory:
    """A memory of this size with random content."""
    device = method.reader.model.device

    def random(tokens: int, dtype: torch.dtype) -> KV:
        size = (shape.layers, shape.heads, tokens, shape.size)
        return KV(
            torch.randn(size, device=device, dtype=dtype), torch.randn(size, device=device, dtype=dtype)
        )

    row = Row(
        sink=random(held.sink, shape.dtype),
        slots=random(held.slots, torch.float32),
        window=random(held.window, shape.dtype),
        segments=held.segments,
        steps=held.folds,
        tokens=held.tokens - held.window,
    )
    memory = Memory((method.noted(row, held.tokens),), method.fingerprint())
    return method.coded(memory) if isinstance(method, Packed) else memory

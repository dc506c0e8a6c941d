"""A recorded step says what the step says. What records here plays operations again, as a CUDA graph does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import history, pad, random_rows, tiny_compressor
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ccm import decoding
from ccm.core.compressor import Compressor
from ccm.core.memory import Memory
from ccm.core.room import ROOM
from ccm.decoding import graph, install
from ccm.errors import ConfigError
from ccm.models import placement
from ccm.serving.engine.padded import run

SEGMENTS = random_rows([[6, 9, 4], [5], [8, 3]], seed=3)
PROMPTS = random_rows([[5, 8, 3]], seed=4)[0]
GREEDY: dict[str, Any] = {"do_sample": False}


class Recorder(TorchDispatchMode):
    """Operations on tensors, to be run again on the same tensors: numbers of Python stay what they were."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, out in self.operations:
            old, new = tree_leaves(out), tree_leaves(func(*args, **kwargs))
            for before, after in zip(old, new, strict=True):
                if isinstance(before, Tensor) and before.data_ptr() != after.data_ptr():
                    before.copy_(after)


@pytest.fixture(autouse=True)
def recorders(monkeypatch) -> Iterator[list[Recorder]]:
    """What has been recorded."""
    found: list[Recorder] = []

    def begun() -> Recorder:
        found.append(Recorder())
        return found[-1]

    @contextmanager
    def recording(recorder: Recorder, capture_error_mode: str) -> Iterator[None]:
        with recorder:
            yield

    aside = SimpleNamespace(wait_stream=lambda other: None)
    cuda = SimpleNamespace(
        Stream=lambda device: aside,
        current_stream=lambda device: aside,
        stream=lambda stream: nullcontext(),
        CUDAGraph=begun,
        graph=recording,
    )
    monkeypatch.setattr(graph, "torch", SimpleNamespace(**{**vars(torch), "cuda": cuda}))
    with torch.no_grad():
        yield found


def graphed(family: str = "llama", **model: Any) -> Compressor:
    compressor = tiny_compressor(family, "sdpa", model)
    compressor.model.ccm_decode_in = "graph"
    return compressor


def memories(compressor: Compressor) -> list[Memory]:
    return [history(compressor, segments, sink=2, window=8) for segments in SEGMENTS]


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma3_text", "phi3"])
def test_answers_are_those_of_the_forward_pass(family, recorders):
    compressor = graphed(family, max_position_embeddings=512)
    memory, new = memories(compressor), ROOM + 9

    def answers() -> list[Tensor]:
        ids, mask = pad(PROMPTS, "left")
        return [
            compressor.generate([PROMPTS[0]], memory[0], max_new_tokens=new, **GREEDY),
            compressor.generate(ids, Memory.stack(memory), mask, max_new_tokens=12, **GREEDY),
        ]

    right = answers()
    install(compressor.model)
    for found, expected in zip(answers(), right, strict=True):
        assert torch.equal(found, expected)
    # the room of the first is used up once; all tokens but the first of each room, and the two that prove the step
    assert len(recorders) == 3
    assert sum(each.replays - 1 for each in recorders) >= new + 12 - 9


def test_rows_come_and_go(recorders):
    compressor = graphed()
    memory = memories(compressor)

    def logits() -> Tensor:
        from ccm.core.batch import Batch

        found, lives = [], []
        for prompt, own in zip(PROMPTS, memory, strict=True):
            lives.append(run(compressor, compressor.live(own), torch.tensor([prompt]))[0])
        batch = Batch(lives[0])
        for number in range(12):
            if number in (4, 7):
                batch.join(lives[len(batch)])
            if number == 10:
                batch.leave([0])
            batch.reserve(1)
            batch.live, last = run(compressor, batch.live, torch.full((len(batch), 1), 5 + number))
            found.append(last)
        return torch.cat(found)

    right = logits()
    install(compressor.model)
    torch.testing.assert_close(logits(), right, atol=1e-5, rtol=1e-5)
    assert len(recorders) == 4  # of one row, of two, of three, and of those that are left


def test_beams_record_nothing(recorders):
    compressor = graphed()
    memory = memories(compressor)[0]
    right = compressor.generate([PROMPTS[1]], memory, num_beams=3, max_new_tokens=12, **GREEDY)
    install(compressor.model)
    assert torch.equal(
        compressor.generate([PROMPTS[1]], memory, num_beams=3, max_new_tokens=12, **GREEDY), right
    )
    assert not recorders


def test_a_recording_goes_with_its_cache(recorders):
    """A new cache may get the same place in memory, but is another tensor."""
    compressor = graphed()
    install(compressor.model)
    for memory in memories(compressor):
        compressor.generate([PROMPTS[0]], memory, max_new_tokens=6, **GREEDY)
    assert len(recorders) == 3


@pytest.mark.parametrize("fault", ["other logits", "no recording"])
def test_a_recording_that_is_wrong_is_not_taken(fault, monkeypatch, caplog):
    compressor = graphed()
    memory = memories(compressor)[0]
    right = compressor.generate([PROMPTS[0]], memory, max_new_tokens=12, **GREEDY)
    if fault == "other logits":
        monkeypatch.setattr(Recorder, "replay", lambda self: self.operations[-1][-1].mul_(2))
    else:

        def failing() -> None:
            raise RuntimeError("operation not permitted when stream is capturing")

        monkeypatch.setattr(graph.torch.cuda, "CUDAGraph", failing)
    install(compressor.model)
    assert torch.equal(compressor.generate([PROMPTS[0]], memory, max_new_tokens=12, **GREEDY), right)
    (step,) = compressor.model.__dict__["_ccm_decoder"]._steps.values()
    assert isinstance(step, graph.Graphed) and not step._records
    assert caplog.text.count("goes on without a CUDA graph") == 1


def test_a_stale_number_would_be_found(monkeypatch):
    """The recorder does not run Python again: a step that bakes in how many entries are held goes wrong with it."""
    compressor = graphed()
    memory = memories(compressor)[0]
    right = compressor.generate([PROMPTS[0]], memory, max_new_tokens=12, **GREEDY)

    def update(self: Any, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.keys[:, :, int(self._end)] = key[:, :, 0]
        self.values[:, :, int(self._end)] = value[:, :, 0]
        return self.keys, self.values

    monkeypatch.setattr(graph._Fixed, "update", update)
    install(compressor.model)
    assert not torch.equal(compressor.generate([PROMPTS[0]], memory, max_new_tokens=12, **GREEDY), right)


def test_it_is_for_cuda():
    with pytest.raises(ConfigError, match="decode in graph: it is for CUDA devices, this is cpu"):
        placement.place(None, "float32", "cpu", decode_in="graph")
    assert decoding.decodes_from(graphed().model) is None  # no copy of the weights

"""Several segments in one pass are what they are one by one."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from tiny import random_rows, tiny_compressor
from torch.utils._python_dispatch import TorchDispatchMode

from ccm.core import onward
from ccm.core.compressor import Compressor
from ccm.core.memory import Memory, Row
from ccm.core.onward import Turn
from ccm.errors import ConfigError, MismatchError

RULES = ["concat", "mean", "ema", "replace", "bounded-merge", "bounded-drop"]
#: What the rows hold before: nothing, one segment, several.
BEFORE = random_rows([[], [7], [5, 9, 3, 6, 4]], seed=1)
#: What they take in: segments shorter than the sink and longer than the window.
AFTER = random_rows([[2, 6, 13], [4], [5, 3, 8, 2, 6]], seed=2)
SIZES = [(0, 0), (3, 0), (0, 9), (3, 12)]


@lru_cache(maxsize=8)
def compressor_of(family: str, rule: str) -> Compressor:
    name, _, overflow = rule.partition("-")
    options = {"blocks": 2, "overflow": overflow} if name == "bounded" else {}
    return tiny_compressor(family, rule=name, rule_options=options)


def one_by_one(of: Compressor, memory: Memory, turn: Turn, sink: int) -> Memory:
    for ids, window in zip(turn.segments, turn.windows, strict=True):
        memory = of.compress([ids], memory, sink=sink, window=window)
    return memory


def turns_of(window: int, room: int = 0) -> list[Turn]:
    return [Turn(own, [*[window] * (len(own) - 1), window + room]) for own in AFTER]


def begun(of: Compressor, sink: int, window: int) -> Memory:
    rows = []
    for own in BEFORE:
        memory = of.empty()
        for ids in own:
            memory = of.compress([ids], memory, sink=sink, window=window)
        rows.append(memory)
    return Memory.stack(rows)


def assert_close(a: Row, b: Row, within: float = 1e-5) -> None:
    """The same counters, and keys and values that differ by rounding alone."""
    for name in ("segments", "steps", "tokens", "dropped", "merged", "merged_segments", "recent", "notes"):
        assert getattr(a, name) == getattr(b, name), name
    for name in ("sink", "slots", "window"):
        for x, y in zip(getattr(a, name), getattr(b, name), strict=True):
            assert x.shape == y.shape and x.dtype == y.dtype, name
            # weights are large, so keys are of order 1 to 10
            torch.testing.assert_close(x, y, rtol=within, atol=10 * within)


def difference(a: Row, b: Row) -> float:
    return max(
        float((x - y).abs().max())
        for name in ("sink", "slots", "window")
        for x, y in zip(getattr(a, name), getattr(b, name), strict=True)
        if x.numel()
    )


@pytest.mark.parametrize("room", [0, 6])
@pytest.mark.parametrize(("sink", "window"), SIZES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox"])
def test_one_pass_is_the_recursion(family: str, rule: str, sink: int, window: int, room: int) -> None:
    of = compressor_of(family, rule)
    memory, turns = begun(of, sink, window), turns_of(window, room)
    expected = [one_by_one(of, memory[r], turn, sink).rows[0] for r, turn in enumerate(turns)]
    for a, b in zip(of.take_in(memory, turns, sink=sink).rows, expected, strict=True):
        assert_close(a, b)
    for r, turn in enumerate(turns):
        assert_close(of.take_in(memory[r], [turn], sink=sink).rows[0], expected[r])


@pytest.mark.parametrize(("sink", "window"), SIZES)
@pytest.mark.parametrize("rule", ["concat", "mean", "bounded-merge"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox"])
def test_what_is_read_already_is_not_read_again(family: str, rule: str, sink: int, window: int) -> None:
    of = compressor_of(family, rule)
    memory, turns = begun(of, sink, window), turns_of(window)
    expected = [one_by_one(of, memory[r], turn, sink).rows[0] for r, turn in enumerate(turns)]
    known = [0, 3, len(AFTER[2][0])]  # nothing, the beginning of a segment, all of it
    read = [
        of.read([turn.segments[0][:n]], memory[r])[0] if n else None
        for r, (n, turn) in enumerate(zip(known, turns, strict=True))
    ]
    turns = [replace(turn, read=kv) for turn, kv in zip(turns, read, strict=True)]
    for a, b in zip(of.take_in(memory, turns, sink=sink).rows, expected, strict=True):
        assert_close(a, b)


def test_what_is_known_and_stays_needs_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    of = compressor_of("llama", "concat")
    memory = of.compress([BEFORE[1][0]], window=20)
    (kv,) = of.read([AFTER[1][0]], memory)
    expected = of.compress([AFTER[1][0]], memory, window=20)
    monkeypatch.setattr(type(of.body), "forward", None)
    (row,) = of.take_in(memory, [Turn([AFTER[1][0]], [20], kv)]).rows
    assert_close(row, expected.rows[0])


@pytest.mark.parametrize("part", ["mask", "position"])
def test_who_sees_what_and_where_matters(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative controls: everybody sees all that stands before, or slots that moved are met where they were."""
    of = compressor_of("llama", "bounded-drop")
    memory, turns = begun(of, 3, 9), turns_of(9)
    expected = one_by_one(of, memory[2], turns[2], 3).rows[0]
    assert difference(of.take_in(memory[2], [turns[2]], sink=3).rows[0], expected) < 1e-3
    if part == "mask":
        own = onward._visible

        def causal(*args: torch.Tensor) -> torch.Tensor:
            mask = torch.ones_like(own(*args))
            return mask.tril(mask.shape[3] - mask.shape[2])

        monkeypatch.setattr(onward, "_visible", causal)
    else:
        monkeypatch.setattr(onward.Course, "moved", lambda self, seen: self.held + self.sizes[seen])
    assert difference(of.take_in(memory[2], [turns[2]], sink=3).rows[0], expected) > 0.1


def test_bad_input_is_refused() -> None:
    of = compressor_of("llama", "concat")
    with pytest.raises(ConfigError, match="shape"):
        of.take_in(of.empty(), [Turn([[]], [0])])
    with pytest.raises(ConfigError, match="vocabulary"):
        of.take_in(of.empty(), [Turn([[5], [10_000]], [0, 0])])
    with pytest.raises(ConfigError, match="context of 256"):
        of.take_in(of.empty(), [Turn([[5] * 200, [6] * 60], [0, 0])])
    with pytest.raises(MismatchError):
        of.take_in(compressor_of("llama", "mean").empty(), [Turn([[5]], [0])])


class Operations(TorchDispatchMode):
    """Names of the operations that run, but for views, and the bytes that they write."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.written = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view:
            self.names.append(str(func))
            self.written += out.nbytes
        return out


def passed(blocks: int) -> Operations:
    """What runs when two segments push two out of the window, over a full memory of so many blocks."""
    of = tiny_compressor(rule="bounded", rule_options={"blocks": blocks})
    texts = random_rows([[4] * (blocks + 4)], seed=5)[0]
    memory = of.empty()
    for ids in texts:
        memory = of.compress([ids], memory, sink=3, window=8)
    assert memory.steps > blocks
    with Operations() as found:
        of.take_in(memory, [Turn(texts[:2], [8, 8])], sink=3)
    return found


def test_a_pass_takes_few_operations_and_a_larger_memory_no_more() -> None:
    few, many = passed(4), passed(64)
    assert len(few.names) == len(many.names) <= 484
    # keys and values of the slots, 60 blocks of 3 in 3 layers of 2 heads of 8 floats: of each so many copies
    assert (many.written - few.written) / (2 * 60 * 3 * 3 * 2 * 8 * 4) < 6.5

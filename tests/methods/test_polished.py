"""Learned slots that are polished: attention misses less than it did, at the same keys and bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from method_cases import TOKENIZER, model, tiny_adapters
from torch import Tensor

from ccm import get_method
from ccm.core.memory import KV, Memory
from ccm.errors import ConfigError
from ccm.methods import Method
from ccm.methods.scores import weights

#: Token ids of three segments.
TOLD = [[40, 41, 42, 43, 44, 45, 47, 48], [50, 51, 52, 53, 40], [60, 61, 62, 63, 64, 65, 66]]
#: Plain; layers that slide; partial rotary.
FAMILIES = ["llama", "gemma3_text", "gpt_neox"]


def pair(folder: Path, family: str = "llama", **options) -> tuple[Method, Method]:
    """The adapter alone and polished, on one compressor."""
    adapter = tiny_adapters(folder, family, ["polished"])["polished"]
    sizes = {"adapter": adapter, "sink": 2, "window": 0}
    alone = get_method("ccm-concat", **sizes).bind(model(family), TOKENIZER)
    return alone, get_method("polished", **sizes | options).bind(alone.reader, TOKENIZER)


def seen(method: Method, parts: list[KV], memory: int, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Attention weights (L, H, q, N) of queries behind the parts, and their values; the first are slots."""
    kv = KV.cat(part.to(torch.float32) for part in parts)
    found = weights(method.reader, queries, kv.keys, memory=memory, start=kv.length)
    return found.flatten(2, 3).double(), kv.values.double()


@pytest.mark.parametrize("family", FAMILIES)
def test_values_solve_the_least_squares(family: str, tmp_path: Path) -> None:
    """Equal to an independent solution, which stacks the lift as rows; and never further off than the adapter's."""
    alone, method = pair(tmp_path, family, lift=0.5)
    memory = method.fold(method.empty(), [TOLD[0]])
    ((text, queries),) = method.reader.watch([TOLD[1]], memory)
    learned = alone.fold(memory, [TOLD[1]]).rows[0]
    polished = method.fold(memory, [TOLD[1]]).rows[0]
    before = memory.rows[0]
    n = learned.slots.length - before.slots.length
    assert n == 3 and polished.slots.length == learned.slots.length
    assert torch.equal(polished.slots.keys, learned.slots.keys)
    assert torch.equal(polished.slots.values[:, :, :-n], before.slots.values), "old slots stay"

    start, new = before.length, learned.slots.slice(-n)
    b, values = seen(method, [before.sink, before.slots, text], start, queries)
    wanted = b @ values
    b, values = seen(method, [before.sink, before.slots, new], start + n, queries)
    b, rest = b[..., -n:], b[..., :-n] @ values[:, :, :-n]
    most = (b.mT @ b).diagonal(dim1=2, dim2=3).amax(-1)[..., None, None]
    ridge = (0.5 * most).sqrt() * torch.eye(n, dtype=torch.float64)
    rows = torch.cat([b, ridge], dim=2)
    right = torch.cat([wanted.double() - rest, ridge @ new.values.double()], dim=2)
    expected = torch.linalg.lstsq(rows, right).solution
    got = polished.slots.values[:, :, -n:].double()
    assert torch.allclose(got, expected, atol=1e-4)

    def missed(values: Tensor) -> Tensor:
        return (wanted - rest - b @ values.double()).square().sum((2, 3))

    learned_off = missed(new.values)
    assert (missed(got) <= learned_off * (1 + 1e-6)).all()
    assert missed(got).sum() < 0.9 * learned_off.sum()
    shuffled = missed(got.roll(1, dims=1))  # negative control: the values of another head
    assert (shuffled > learned_off).any()


def test_a_strong_lift_is_the_adapter_alone(tmp_path: Path) -> None:
    alone, method = pair(tmp_path, lift=1e7)
    weak = method.resized(lift=0.1)
    of = {name: each.empty() for name, each in (("alone", alone), ("strong", method), ("weak", weak))}
    for segment in TOLD:
        of["alone"] = alone.fold(of["alone"], [segment])
        of["strong"] = method.fold(of["strong"], [segment])
        of["weak"] = weak.fold(of["weak"], [segment])
    row = of["alone"].rows[0]
    assert torch.allclose(of["strong"].rows[0].slots.values, row.slots.values, atol=1e-4)
    assert not torch.allclose(of["weak"].rows[0].slots.values, row.slots.values, atol=1e-2)
    assert of["weak"].nbytes == of["alone"].nbytes


def test_rows_that_fold_at_different_times_are_polished_each(tmp_path: Path) -> None:
    """Also where the largest row of the batch does not fold."""
    _, method = pair(tmp_path)
    method = method.resized(window=10)
    full, fresh = method.empty(), method.empty()
    for segment in (TOLD[0], TOLD[2], [50]):
        full = method.fold(full, [segment])
    fresh = method.fold(fresh, [TOLD[1] + TOLD[1]])
    assert (full.slots, fresh.slots) == (3, 0)
    both = method.fold(Memory.stack([full, fresh]), [[60], [61]])
    assert [row.slots.length for row in both.rows] == [3, 3]
    alone = method.fold(fresh, [[61]])
    assert torch.allclose(both.rows[1].slots.values, alone.rows[0].slots.values, atol=1e-4)


def test_what_a_window_pushes_out_is_polished(tmp_path: Path) -> None:
    """The queries of the newest text ask of the segment that leaves; text that stays raw changes nothing."""
    alone, method = pair(tmp_path)
    alone, method = alone.resized(window=12), method.resized(window=12)
    memory = method.empty()
    for segment in TOLD[:2]:
        before, memory = memory, method.fold(memory, [segment])
    assert memory.rows[0].slots.length == 3 and memory.rows[0].window.length == len(TOLD[1])
    learned = alone.fold(before, [TOLD[1]]).rows[0]
    assert torch.equal(memory.rows[0].window.keys, learned.window.keys)
    assert not torch.allclose(memory.rows[0].slots.values, learned.slots.values, atol=1e-3)


def test_a_full_memory_has_its_newest_slots_polished(tmp_path: Path) -> None:
    """The rule of the shipped adapter: old blocks merge as they do without it."""
    alone, method = pair(tmp_path)
    rule = {"rule": "bounded", "rule_options": {"blocks": 2}}
    alone, method = (get_method(m.name, adapter=m.adapter, sink=2, window=0, **rule) for m in (alone, method))
    alone = alone.bind(model(), TOKENIZER)
    method = method.bind(alone.reader, TOKENIZER)
    memory = method.empty()
    for segment in TOLD[:2]:
        memory = method.fold(memory, [segment])
    learned, polished = (of.fold(memory, [TOLD[2]]).rows[0] for of in (alone, method))
    assert memory.slots == learned.slots.length == polished.slots.length == 6
    assert torch.equal(polished.slots.keys, learned.slots.keys)
    assert torch.equal(polished.slots.values[:, :, :3], learned.slots.values[:, :, :3])
    assert not torch.allclose(polished.slots.values[:, :, 3:], learned.slots.values[:, :, 3:], atol=1e-3)


def test_the_shipped_adapter_is_polished(embedded: tuple[Any, Any]) -> None:
    bound = get_method("polished").bind(*embedded)
    assert bound.reader.rule.name in ("concat", "bounded") and bound.slots == bound.reader.config.slots


def test_it_refuses_what_it_cannot_polish(tmp_path: Path) -> None:
    adapter = tiny_adapters(tmp_path, names=["ccm-merge"])["ccm-merge"]
    with pytest.raises(ConfigError, match=r"got rule 'mean', expected 'concat' or 'bounded'"):
        get_method("polished", adapter=adapter).bind(model(), TOKENIZER)
    for lift in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="lift is"):
            get_method("polished", lift=lift)

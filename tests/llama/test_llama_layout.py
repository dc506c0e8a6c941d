"""The bytes of a state: what is packed is unpacked, and another layout is refused. No llama.cpp is needed."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from ccm.core.memory import KV
from ccm.serving.llama.layout import Layout, LayoutError, transposed_in

WAYS = list(itertools.product(("f32", "f16", "q8_0"), (False, True), (False, True), (1, 3)))
#: Of the largest number, by type.
ERROR = {"f32": 0, "f16": 1e-3, "q8_0": 1e-2}


def layout(kind="f32", transposed=False, interleaved=False, streams=1):
    return Layout(3, 2, 32, kind, streams, transposed and kind != "q8_0", interleaved)


def kv(entries=5):
    generator = torch.Generator().manual_seed(0)
    return KV(*(torch.randn(3, 2, entries, 32, generator=generator) for _ in range(2)))


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_what_is_packed_is_unpacked(way):
    laid, known = layout(*way), kv()
    blob = laid.pack(known)
    assert transposed_in(blob) == laid.transposed
    for got, expected in zip(laid.unpack(blob), known, strict=True):
        assert (got - expected).abs().max() <= ERROR[laid.kind] * expected.abs().max()
    part = laid.unpack(blob, 3)
    assert part.length == 2 and torch.equal(part.keys, laid.unpack(blob).keys[:, :, 3:])


def test_the_bytes_are_those_that_llama_cpp_writes():
    """One layer, one head of four numbers, two entries; the halves of the keys are interleaved, values transposed."""
    keys = torch.tensor([[0.0, 1, 2, 3], [4, 5, 6, 7]]).view(1, 1, 2, 4)
    laid = Layout(1, 1, 4, "f32", 2, transposed=True, interleaved=True)
    words = laid.pack(KV(keys, keys)).view(np.uint32)
    assert words[:4].tolist() == [0xAF143CD8, 0, 2, 2]  # mark, flags, streams, cells
    assert words[4:12].tolist() == [0, 1, 0, 1, 1, 0, 1, 1]  # two cells; transposed, layers
    assert words[12:15].tolist() == [0, 16, 0]  # type, bytes a row (64 bits)
    assert words[15:23].view(np.float32).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert words[23:26].tolist() == [0, 4, 4]  # type, bytes a number, numbers
    assert words[26:34].view(np.float32).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert words[34:].tolist() == [0]  # the other stream


def test_cells_in_another_order():
    laid, known = layout(), kv()
    blob = laid.pack(known)
    start, row = 16 + 12 * 5 + 8, 4 * 64
    cells = blob[16 : 16 + 60].reshape(5, 12)
    cells[[0, 4]] = cells[[4, 0]]
    for section in range(6):  # keys and values of three layers
        at = start + section * (12 + 5 * row) + 12
        rows = blob[at : at + 5 * row].reshape(5, row)
        rows[[0, 4]] = rows[[4, 0]]
    assert torch.equal(laid.unpack(blob).keys, known.keys)


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"layers": 4}, "length"),
        ({"heads": 1}, "length"),
        ({"kind": "f16"}, "length"),
        ({"streams": 2}, "number of streams"),
        ({"transposed": True}, "way of values"),
    ],
)
def test_another_layout_is_refused(changed, what):
    blob = layout().pack(kv())
    with pytest.raises(LayoutError, match=what):
        replace(layout(), **changed).unpack(blob)


@pytest.mark.parametrize("at", [0, 12, 16, 20, 76, 84, 88])
def test_changed_bytes_are_refused(at):
    """Of the mark, the number of cells, a position, a sequence, the way of values, a type and a row's size."""
    blob = layout().pack(kv())
    blob[at] ^= 4
    with pytest.raises(LayoutError, match="otherwise than is known here"):
        layout().unpack(blob)

"""The contract of the library on a tiny model: what a family must pass before it is let in.

Errors are given in standard deviations of the model's logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from .twin import VOCAB

if TYPE_CHECKING:
    from .compressor import Compressor
    from .memory import Memory


def _unknown(model: PreTrainedModel) -> Compressor:
    raise RuntimeError("ccm.core.compressor has not been imported")


#: Makes a compressor of a tiny model. Its own module says how, because a compressor is built on what is tried here.
make: Callable[[PreTrainedModel], Compressor] = _unknown
#: What an equality may miss, and what a memory must change.
TOLERANCE, MATTERS = 1e-3, 1e-2
# Segments shorter than the sink, and longer than the window and than the sliding windows of the tiny model.
LENGTHS = ((5, 4, 7, 3), (2, 11, 3))
SIZES = ((0, 0), (3, 9))
Logits = list[Tensor]


class Outcome(NamedTuple):
    """What was measured.

    Attributes:
        parallel: difference between one parallel pass and the recursion, slots alone.
        window: the same with a sink and a recent window.
        plain: difference between tokens over a raw window and the plain model.
        effect: the least that a memory changes.
        others: tokens of three that ``generate`` chooses otherwise than the logits over the same memory.
    """

    parallel: float
    window: float
    plain: float
    effect: float
    others: int

    def check(self) -> None:
        """Raises UnsupportedModelError if one of them is not as it must be."""
        for what, error in (
            ("one parallel pass and the recursion", self.parallel),
            ("one parallel pass and the recursion with a sink and a window", self.window),
            ("tokens over a raw window and the plain model", self.plain),
        ):
            if not error < TOLERANCE:
                raise UnsupportedModelError(
                    f"a small model of its config gives other logits for {what}: {error:.2g} standard deviations, at "
                    f"most {TOLERANCE:g} are rounding"
                )
        if self.others:
            raise UnsupportedModelError(
                f"generate() in a small model of its config gives {self.others} of 3 tokens that the logits over the "
                "same memory do not give"
            )
        if not self.effect > MATTERS:
            raise UnsupportedModelError(
                f"its memory does not matter: in a small model of its config it changes logits by {self.effect:.2g} "
                f"standard deviations, expected more than {MATTERS:g}"
            )


@torch.no_grad()
def measure(model: PreTrainedModel) -> Outcome:
    """Try a tiny model (``ccm.core.twin``) out."""
    ids = torch.Generator().manual_seed(0)
    rows = [[torch.randint(3, VOCAB, (n,), generator=ids).tolist() for n in row] for row in LENGTHS]
    text = torch.tensor([[token for segment in rows[0] for token in segment]])
    plain = model(input_ids=text).logits[0]
    compressor = make(model)
    compressor.cautions.warned = True  # of texts without a sink; nobody reads these
    weights = torch.Generator().manual_seed(1)
    for parameter in compressor.lora_parameters:
        parameter.normal_(0, 0.2, generator=weights)
    scale = float(plain.std())
    errors, effects = [], []
    for sink, window in SIZES:
        out = compressor(rows, sink=sink, window=window)
        for r, row in enumerate(rows):
            logits = _recurrent(compressor, row, sink, window)
            pairs = [(out.segment_logits(r, j), own) for j, own in enumerate(logits)]
            errors.append(max(_apart(a, b) for a, b in pairs) / scale)
            alone = [compressor.logits([segment])[0] for segment in row[1:]]
            effects.append(min(_apart(a, b) for a, b in zip(logits[1:], alone, strict=True)) / scale)
    raw = torch.cat(_recurrent(compressor, rows[0], 0, text.shape[1]))
    half = len(rows)
    others = _otherwise(compressor, rows[0])
    return Outcome(max(errors[:half]), max(errors[half:]), _apart(raw, plain) / scale, min(effects), others)


def _otherwise(compressor: Compressor, row: list[list[int]]) -> int:
    *folded, prompt = row
    memory: Memory | None = None
    for segment in folded:
        memory = compressor.compress([segment], memory, sink=2)
    ids = compressor.generate([prompt], memory, max_new_tokens=3, do_sample=False)[0]
    best = compressor.logits(ids[None, :-1], memory)[0].argmax(-1)
    return int((best[len(prompt) - 1 :] != ids[len(prompt) :]).sum())


def _recurrent(compressor: Compressor, row: list[list[int]], sink: int, window: int) -> Logits:
    """Logits of each segment, folded one by one."""
    memory: Memory | None = None
    result = []
    for segment in row:
        result.append(compressor.logits([segment], memory)[0])
        memory = compressor.compress([segment], memory, sink=sink, window=window)
    return result


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())

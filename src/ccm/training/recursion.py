"""The loss of a batch in two ways: by one parallel pass, and by the recursion with backpropagation through time.

Both give the same sum over the same target tokens, and the same gradients. Training takes the parallel pass; the
recursion is what inference runs (``Compressor.compress``), and what the parallel pass is measured against.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..compressor import Compressor
from ..data.rows import ConversationRow
from ..errors import ConfigError
from ..memory import Memory
from .objectives import OBJECTIVES, summed_loss

#: (row, segment, column, token id) of a token to be predicted, from the state one column before it.
Target = tuple[int, int, int, int]

# What inference runs, without its no_grad.
_compress = Compressor.compress.__wrapped__
_read = Compressor.read.__wrapped__


def targets(rows: Sequence[ConversationRow]) -> list[Target]:
    """The scored tokens of every segment but the first of each row; a segment's first token is never one.

    Raises:
        ConfigError: there are none.
    """
    found = [
        (r, i, column, row.segments[i][column])
        for r, row in enumerate(rows)
        for i in range(1, len(row.segments))
        for column in range(max(1, row.content[i][0]), row.content[i][1])
    ]
    if not found:
        raise ConfigError(
            f"got {len(rows)} rows without a target; give two segments or more, the last with content"
        )
    return found


def parallel_losses(
    compressor: Compressor, rows: Sequence[ConversationRow], objective: str = "distill", **sizes: int
) -> tuple[Tensor, int]:
    """Summed loss of a batch by one parallel pass, and the number of target tokens.

    Args:
        compressor: whose adapter gets the gradient.
        rows: of any numbers and lengths of segments.
        objective: "distill", with the base model and full context as teacher, or "ce".
        sizes: slots, sink, window, if other than the configured ones.
    """
    layout = compressor.lay_out([row.segments for row in rows], **sizes)
    places = [(r, layout.spans[r][i][0] + column - 1) for r, i, column, _ in targets(rows)]
    return _loss(compressor, rows, _at(compressor.hidden(layout), places), objective)


def recurrent_losses(
    compressor: Compressor, rows: Sequence[ConversationRow], objective: str = "distill", **sizes: int
) -> tuple[Tensor, int]:
    """The same by the recursion: each segment runs on the memory of the step before it, with gradients.

    Arguments and result are those of :func:`parallel_losses`. The rows of a batch go in step; a segment is read and
    folded in one forward pass, and the last one of the longest row is only read. Gradient checkpointing must be
    off, because it loses the memory.
    """
    states = _recurrent_states(compressor, [row.segments for row in rows], **sizes)
    student = torch.stack([states[r][i][column - 1] for r, i, column, _ in targets(rows)])
    return _loss(compressor, rows, student, objective)


def _recurrent_states(
    compressor: Compressor, rows: Sequence[Sequence[Sequence[int]]], **sizes: int
) -> list[list[Tensor]]:
    """Last hidden states (T_segment, d) of every segment of every row."""
    states: list[list[Tensor]] = [[] for _ in rows]
    memories = [compressor.empty() for _ in rows]
    passes: list[Tensor] = []
    base = compressor.model.base_model
    hook = base.register_forward_hook(lambda module, args, out: passes.append(out.last_hidden_state))
    steps = max(map(len, rows))
    try:
        for step in range(steps):
            alive = [r for r, row in enumerate(rows) if step < len(row)]
            segments = [rows[r][step] for r in alive]
            width = max(map(len, segments))
            ids = torch.tensor([[0] * (width - len(s)) + list(s) for s in segments])
            mask = torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in segments])
            memory = Memory.stack([memories[r] for r in alive])
            passes.clear()
            if step + 1 < steps:
                memory = _compress(compressor, ids, memory, mask, **sizes)
            else:
                _read(compressor, ids, memory, mask)
            # the first pass of a step is the one over the text, left-padded; with a window, folds come after it
            for place, (r, segment) in enumerate(zip(alive, segments, strict=True)):
                states[r].append(passes[0][place, width - len(segment) : width])
                memories[r] = memory[place]
    finally:
        hook.remove()
    return states


def _loss(
    compressor: Compressor, rows: Sequence[ConversationRow], student: Tensor, objective: str
) -> tuple[Tensor, int]:
    """Summed loss from the student's states (N, d) at the targets."""
    teacher = _teacher_states(compressor, rows) if objective == "distill" else student
    ids = torch.tensor([token for *_, token in targets(rows)], device=student.device)
    return summed_loss(student, teacher, ids, compressor.head, OBJECTIVES[objective]), len(ids)


@torch.no_grad()
def _teacher_states(compressor: Compressor, rows: Sequence[ConversationRow]) -> Tensor:
    """The base model's states (N, d) at the targets, with the whole context."""
    layout = compressor.lay_out([[sum(row.segments, ())] for row in rows])
    before = [[sum(map(len, row.segments[:i])) for i in range(len(row.segments))] for row in rows]
    places = [(r, before[r][i] + column - 1) for r, i, column, _ in targets(rows)]
    return _at(compressor.hidden(layout), places)


def _at(hidden: Tensor, places: Sequence[tuple[int, int]]) -> Tensor:
    """(N, d) from (B, Q, d) at (row, column) pairs."""
    row, column = torch.tensor(places, device=hidden.device).T
    return hidden[row, column]

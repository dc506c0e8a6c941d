"""The loss of a batch in two ways: by one parallel pass, and by the recursion with backpropagation through time.

Both give the same sum over the same target tokens, and the same gradients. Training takes the parallel pass; the
recursion is what inference runs (``Compressor.compress``), and what the parallel pass is measured against.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..core.compressor import Compressor
from ..core.memory import Memory
from ..core.segments import left_padded
from ..data.rows import ConversationRow
from ..errors import ConfigError
from .objectives import OBJECTIVES
from .targets import TEXT, find_targets, marked, scored_from

#: Per row the columns (start, stop) of every segment.
Spans = Sequence[Sequence[tuple[int, int]]]


def parallel_losses(
    compressor: Compressor, rows: Sequence[ConversationRow], objective: str = "distill", **sizes: int
) -> tuple[Tensor, int]:
    """Summed loss of a batch by one parallel pass, and the number of target tokens.

    Args:
        compressor: whose adapter gets the gradient.
        rows: of any numbers and lengths of segments.
        objective: "distill", with the base model and full context as teacher, or "ce".
        sizes: slots, sink, window, if other than the configured ones.

    Raises:
        ConfigError: no segment but the first of its row has content.
    """
    _check_decoder(compressor)
    layout = compressor.lay_out([row.segments for row in rows], **sizes)
    return _loss(compressor, rows, compressor.hidden(layout), layout.spans, objective)


def recurrent_losses(
    compressor: Compressor, rows: Sequence[ConversationRow], objective: str = "distill", **sizes: int
) -> tuple[Tensor, int]:
    """The same by the recursion: each segment runs on the memory of the step before it, with gradients.

    Arguments and result are those of :func:`parallel_losses`. The rows of a batch go in step; a segment is read and
    folded in one forward pass, and the last one of the longest row is only read. Gradient checkpointing must be
    off, because it loses the memory.

    Raises:
        ConfigError: as there, or a compressor of another kind than CCM.
    """
    _check_decoder(compressor)
    if compressor.config.kind != "ccm":
        raise ConfigError(f"the recursion is that of kind 'ccm'; got {compressor.config.kind!r}")
    states, spans = _recurrent_states(compressor, [row.segments for row in rows], **sizes)
    return _loss(compressor, rows, states, spans, objective)


def _check_decoder(compressor: Compressor) -> None:
    if compressor.two_sided:
        raise ConfigError(
            "both ways are those of decoders: ccm.training.written has that of an encoder-decoder"
        )


def _recurrent_states(
    compressor: Compressor, rows: Sequence[Sequence[Sequence[int]]], **sizes: int
) -> tuple[Tensor, Spans]:
    """Last hidden states (B, T, d) of the text of every row, right-padded, and where its segments are in it."""
    states: list[list[Tensor]] = [[] for _ in rows]
    chosen = [compressor.size(name, sizes.get(name)) for name in ("slots", "sink", "window")]
    device = compressor.model.device
    memories = [compressor.empty() for _ in rows]
    passes: list[Tensor] = []
    base = compressor.body
    hook = base.register_forward_hook(lambda module, args, out: passes.append(out.last_hidden_state))
    steps = max(map(len, rows))
    try:
        for step in range(steps):
            alive = [r for r, row in enumerate(rows) if step < len(row)]
            ids, mask = left_padded([rows[r][step] for r in alive], device)
            memory = Memory.stack([memories[r] for r in alive])
            passes.clear()
            if step + 1 < steps:
                memory = compressor.advance(memory, ids, mask, *chosen)
            else:
                compressor.step(memory, ids, mask, None)
            # the first pass of a step is the one over the text, left-padded; with a window, folds come after it
            for place, r in enumerate(alive):
                states[r].append(passes[0][place, : ids.shape[1]][mask[place]])
                memories[r] = memory[place]
    finally:
        hook.remove()
    ends = [[0, *accumulate(map(len, row))] for row in rows]
    spans = [list(pairwise(end)) for end in ends]
    return pad_sequence([torch.cat(own) for own in states], batch_first=True), spans


def _loss(
    compressor: Compressor, rows: Sequence[ConversationRow], student: Tensor, spans: Spans, objective: str
) -> tuple[Tensor, int]:
    """Summed loss over the content of every segment but the first of each row, and its number of tokens."""
    scored = [scored_from(marked(replace(row, recall=())), 1) for row in rows]
    targets = find_targets(scored, spans)[TEXT]
    if not len(targets):
        raise ConfigError(
            f"got {len(rows)} rows without a target; give two segments or more, the last with content"
        )
    teacher = None
    if objective == "distill":
        with torch.no_grad():
            teacher = compressor.hidden(compressor.lay_out([row.flat().segments for row in scored]))
    return targets.loss(student, teacher, compressor.head, OBJECTIVES[objective]), len(targets)

"""Several segments behind memories that hold something already, taken in by one pass.

A fold costs what reading all weights costs, whether it holds 32 tokens or 4. So all that a turn brings goes through
the model together: text that is new, and the COMP tokens of every segment that leaves the window meanwhile.

    keys     [ sink | slots, old and new | raw text that is known | new text and COMP tokens ]
    queries                                                         new text and COMP tokens

It is the recursion of ``compressor.compress``, segment by segment, by the means of the parallel pass: who sees what
is a mask, and every state of the slots that anybody sees is made inside the attention call. Slots that a fold leaves
as they are stay one column, also if they move: it is the positions of the queries that move then.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import DynamicCache

from . import attention
from .adapter import Adapted
from .attention import MaskedPlan, additive, heads, in_both_frames
from .folding import put
from .memory import KV, Memory, Row, placed_layers
from .room import CACHE
from .rotary import Rotary, Tables, rotate, unrotate
from .rule import Rule
from .window import joined, overflow


@dataclass(frozen=True)
class Turn:
    """What one conversation takes in.

    Attributes:
        segments: token ids of each segment.
        windows: raw tokens that may stay behind each of them.
        read: position-free keys and values of the first tokens of the first segment, if they are known.
    """

    segments: Sequence[Sequence[int]]
    windows: Sequence[int]
    read: KV | None = None


#: First and last number of folds seen by those who see a column, and its position.
Column = tuple[int, int, int]
NOBODY: Column = (1, 0, 0)
#: (token id, segment, index of a COMP token or -1, folds seen, position in the text, position behind the slots)
Token = tuple[int, int, int, int, int, int]
PADDING: Token = (0, -1, -1, 0, 0, 0)


class Course:
    """One row of the pass: its tokens, and the states that its slots go through.

    Folds are counted from the row as it is. Positions of text count from the first raw token that is known; those
    behind the slots are the canonical ones, further up by what the slots that stay have moved down.

    Args:
        row: of the memory.
        turn: what it takes in.
        n: slots of a block.
        rule: how blocks go in.
        sink: raw tokens of the first segment of all that stay.
    """

    def __init__(self, row: Row, turn: Turn, n: int, rule: Rule, sink: int):
        self.row, self.turn, self.n, self.rule, self.sink = row, turn, n, rule, sink
        self.known = [row.sink, row.window, *([] if turn.read is None else [turn.read])]
        self.raw = sum(kv.length for kv in self.known[1:])  # tokens behind the sink
        self.lengths = [*row.segments, *map(len, turn.segments)]
        self._starts = [sum(self.lengths[:i]) for i in range(len(self.lengths) + 1)]
        self.held = row.sink.length if row.steps else row.pinned + min(sink, self.lengths[0])
        self.tokens: list[Token] = []
        self.spans: list[slice] = []  # columns of the text of each segment of the turn
        self.groups: list[slice] = []  # and of each group of COMP tokens
        self.columns: list[Column] = []
        self.drifts = [0]
        self.sizes = [row.slots.length]
        self._front = 0  # slots of the row that go, which are the first
        self._new = 0  # new slots in front of those that stay, in the end
        self._state = [self._column(0, place) for place in range(row.slots.length)]
        self._run()

    def _run(self) -> None:
        first, folds = len(self.row.segments), 0
        for j, (ids, window) in enumerate(zip(self.turn.segments, self.turn.windows, strict=True), first):
            begin = max(self.raw - self._starts[j], 0)
            texts = [(token, -1, self._starts[j] + p) for p, token in enumerate(ids)][begin:]
            self.spans.append(self._put(texts, j, folds))
            for _ in range(overflow(self.lengths[folds : j + 1], window)):
                end = self._starts[folds + 1]
                self.groups.append(self._put([(0, i, end + i) for i in range(self.n)], folds, folds))
                self._fold(folds)
                folds += 1

    def _put(self, tokens: Sequence[tuple[int, int, int]], segment: int, seen: int) -> slice:
        start, moved = len(self.tokens), self.moved(seen)
        self.tokens += [(token, segment, comp, seen, at, at + moved) for token, comp, at in tokens]
        return slice(start, len(self.tokens))

    def moved(self, seen: int) -> int:
        """From a position in the text to one behind the slots, for who sees so many folds."""
        held = self.held if self.row.steps + seen else self.row.pinned
        return held + self.sizes[seen] + self.drifts[seen] - self._starts[seen]

    def _fold(self, folds: int) -> None:
        slots = self.sizes[-1]
        start, place = self.rule.kept(self.row.steps + folds + 1, slots, self.n)
        gone, stay = self._state[:start], self._state[start:]
        self._front = max([self._front, *(column + 1 for column in gone if column < self.row.slots.length)])
        self._new = place
        for column in gone:
            self.columns[column] = (self.columns[column][0], folds, self.columns[column][2])
        self.drifts.append(self.drifts[-1] + (start - place if stay else 0))
        self.sizes.append(place + len(stay) + self.n)
        new = [
            self._column(folds + 1, at) for at in (*range(place), *range(place + len(stay), self.sizes[-1]))
        ]
        self._state = [*new[:place], *stay, *new[place:]]

    def _column(self, folds: int, place: int) -> int:
        self.columns.append((folds, len(self.lengths), self.held + place + self.drifts[folds]))
        return len(self.columns) - 1

    @property
    def places(self) -> list[tuple[int, Column]]:
        """Columns of the sink, each with its token: one for all who stand where the slots have moved as far."""
        found: list[tuple[int, Column]] = []
        for drift in sorted(set(self.drifts)):
            those = [seen for seen, moved in enumerate(self.drifts) if moved == drift]
            for i in range(self.held):
                # before the first fold it is text, but for what is pinned
                whose = [seen for seen in those if self.row.steps + seen or i < self.row.pinned]
                if whose:
                    found.append((i, (whose[0], whose[-1], drift + i)))
        return found

    def sources(self, width: int) -> list[tuple[int]]:
        """Where these are in known text of that width, and the tokens behind it."""
        # before the first fold the sink goes on with the beginning of the text
        known = self.row.sink.length + self.raw
        return [(i if i < known else width + i - known,) for i, _ in self.places]

    def comp(self, width: int) -> list[tuple[int]]:
        """Where the COMP tokens are in the same."""
        return [(width + column,) for group in self.groups for column in range(group.start, group.stop)]

    @property
    def one_frame(self) -> bool:
        """Whether all raw text that a token sees is as far from the slots as itself."""
        moves = {self.moved(seen) for seen in {token[3] for token in self.tokens}}
        return len(moves) == 1 or not (self.row.window.length or any(self.turn.windows))

    def states(self, slots: Tensor, blocks: Tensor) -> list[Tensor]:
        """Parts (H, ., D) of all columns of the slots, from those of the row (H, m, D) and blocks (G, H, n, D)."""
        parts, slots = [slots], slots[:, : self._front]
        for step, block in enumerate(blocks, self.row.steps + 1):
            _, place = self.rule.kept(step, slots.shape[1], self.n)
            slots = self.rule.update(slots, block, step)
            parts += [slots[:, :place], slots[:, slots.shape[1] - self.n :]]
        return parts

    def taken(self, new: KV, dtype: torch.dtype) -> Row:
        """The row after the pass, from the position-free keys and values (L, H, Q, D) of its tokens."""
        slots, groups = self.row.slots, iter(self.groups)
        row = replace(self.row, slots=slots.slice(0, self._front))  # those behind stay as they are
        for j, (ids, window) in enumerate(zip(self.turn.segments, self.turn.windows, strict=True)):
            text = new.slice(self.spans[j].start, self.spans[j].stop).to(dtype)
            if text.length < len(ids):
                text = KV.cat([*self.known[2:], text])
            row = joined(row, text, len(ids))
            for _ in range(overflow(row.segments, window)):
                at = next(groups)
                row = put(row, new.slice(at.start, at.stop).to(torch.float32), self.rule, self.sink)
        if not self.groups:
            return replace(row, slots=slots)
        changed = (
            torch.cat([new[:, :, : self._new], old[:, :, self._front :], new[:, :, self._new :]], dim=2)
            for new, old in zip(row.slots, slots, strict=True)
        )
        return replace(row, slots=KV(*changed))


@dataclass
class OnwardPlan(MaskedPlan):
    """The pass. Columns of keys are [sink | states of the slots | known text | tokens of the pass].

    Keys and values of every layer are put together in the same tensors, row by row: those of one row fit into a
    processor's cache.

    Attributes:
        courses: of the B rows.
        known: of each row, layer by layer, keys (H, W, D) at their positions, and values; its sink and its raw text.
        sink: columns of the sink (s).
        source: (B, s + G n) where these and the COMP tokens are among [known text | tokens].
        columns: of the sink and of the slots (s + S).
        position: (B, Q) at which the model rotates, and (B, W + Q) of the known text as well.
        one_frame: whether text and slots are at positions of one frame.
    """

    together: ClassVar[int] = 1  # neighbours see other states of the slots
    courses: Sequence[Course]
    known: Sequence[Sequence[tuple[Tensor, Tensor]]]
    sink: int
    source: Tensor
    columns: int
    position: Tensor
    raw_position: Tensor
    one_frame: bool
    layer_types: list[str | None]
    tables: dict[str, dict[str | None, Tables]] = field(repr=False)
    _room: tuple[Tensor, Tensor] | None = None

    def extend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, sliding: int | None
    ) -> tuple[Tensor, Tensor, Tensor, Any]:
        layer, size, width = int(module.layer_idx), key.shape[3], self.mask.shape[3]
        tables = {name: found[self.layer_types[layer]] for name, found in self.tables.items()}
        if self._room is None:
            frames = 1 if self.one_frame else 2
            # zeros: what is masked must be numbers, and a key has nothing in the other frame
            shape = key.shape[0], key.shape[1], width
            self._room = key.new_zeros(*shape, frames * size), value.new_zeros(*shape, value.shape[3])
        keys, values = self._room
        for whole, known, new in zip((keys[..., -size:], values), (0, 1), (key, value), strict=True):
            for states, own in zip(whole, self.known, strict=True):
                there = own[layer][known]
                states[:, self.columns : self.columns + there.shape[1]] = there
            whole[:, :, width - new.shape[2] :] = new
        blocks = _gather(keys[:, :, self.columns :, -size:], self.source)
        blocks = unrotate(blocks, *heads(tables["source"]))
        contents = _gather(values[:, :, self.columns :], self.source).float()
        turns = tables["memory"]
        for r, course in enumerate(self.courses):
            memory = torch.cat(self._memory(course, layer, 0, blocks[r]), dim=1)
            end = memory.shape[1]
            turn = turns._replace(cos=turns.cos[r, :end], sin=turns.sin[r, :end])
            keys[r, :, :end, :size] = rotate(memory, *turn)
            torch.cat(self._memory(course, layer, 1, contents[r]), dim=1, out=values[r, :, :end])
        if not self.one_frame:
            query = in_both_frames(query, tables["text"], tables["behind"])
        return query, keys, values, self.seen(sliding, self.position, self.raw_position)

    def _memory(self, course: Course, layer: int, part: int, made: Tensor) -> list[Tensor]:
        """Parts (H, ., D), fp32, of keys or values of the sink and of all states of the slots of a row.

        Args:
            course: of the row.
            layer: of the model.
            part: 0 for keys, which are position-free, 1 for values.
            made: (H, s + G n, D) of the sink and of the COMP tokens.
        """
        sink, blocks = made[:, : self.sink], made[:, self.sink :]
        blocks = blocks.unflatten(1, (-1, course.n)).transpose(0, 1)[: len(course.groups)]
        return [sink, *course.states(course.row.slots[part][layer], blocks)]


class Onward(Adapted):
    """An adapter whose folds go through the model together."""

    @torch.no_grad()
    def take_in(
        self,
        memory: Memory,
        turns: Sequence[Turn],
        *,
        slots: int | None = None,
        sink: int | None = None,
    ) -> Memory:
        """``Compressor.compress`` of several segments per row, one after another, in one pass.

        Args:
            memory: of B conversations.
            turns: what each of them takes in.
            slots, sink: other sizes than the configured ones.

        Raises:
            ConfigError: an empty segment, or more of them than fit the model's context.
            MismatchError: the memory was made by another model or adapter.
        """
        self.check(memory, len(turns))
        memory = memory.to(self.model.device, self.model.dtype)
        self.cautions.untrained(self.lora_parameters)
        n, sink = self.size("slots", slots), self.size("sink", sink)
        for row, turn in zip(memory.rows, turns, strict=True):
            for ids in turn.segments:
                self.tokens([ids], None)  # raises if they are none
            alone = replace(memory, rows=(row,))
            self.check_room(alone, sum(map(len, turn.segments)), n * len(turn.segments))
            if not sink:
                self.cautions.rootless(alone, *self.tokens([turn.segments[0]], None))
        pairs = zip(memory.rows, turns, strict=True)
        rows = self._passed([Course(row, turn, n, self.rule, sink) for row, turn in pairs])
        return Memory(rows, self.fingerprint())

    def _passed(self, courses: Sequence[Course]) -> tuple[Row, ...]:
        """The rows after the pass."""
        dtype = self.model.dtype
        grid = _grid([course.tokens for course in courses], PADDING).to(self.model.device)
        if not grid.shape[1]:  # all of it is known, and nothing leaves a window
            return tuple(course.taken(course.row.window.slice(0, 0), dtype) for course in courses)
        ids, index = grid[..., 0], grid[..., 2]
        embeds = self.model.get_input_embeddings()(ids)
        comp = self.comp_embeddings.to(embeds.dtype)[index.clamp(min=0)]
        embeds = torch.where((index >= 0).unsqueeze(-1), comp, embeds)
        plan = _plan(courses, grid, self.adapter, self.rotary, dtype)
        plan.stop_at = len(self.family.attention) - 1  # what the last layer puts out is of no use here
        cache = DynamicCache()
        with suppress(attention.StatesDone):
            self.body(
                inputs_embeds=embeds,
                attention_mask=plan.mask,
                position_ids=plan.position,
                **{CACHE: cache, attention.PLAN: plan},
            )
        rows = []
        for r, course in enumerate(courses):
            keys = torch.stack([layer.keys[r] for layer in cache.layers])
            values = torch.stack([layer.values[r] for layer in cache.layers])
            kv = KV(unrotate(keys, *self.rotary.stacked(plan.position[r])), values)
            rows.append(course.taken(kv, dtype))
        return tuple(rows)


def _plan(
    courses: Sequence[Course], grid: Tensor, adapter: str, rotary: Rotary, dtype: torch.dtype
) -> OnwardPlan:
    device = grid.device
    _, segment, index, seen, text, behind = grid.unbind(-1)
    one_frame = all(course.one_frame for course in courses)
    position = behind if one_frame else text
    known, whose, at = _known(courses, one_frame, rotary, dtype)
    width = at.shape[1]
    sinks = [[column for _, column in course.places] for course in courses]
    parts = [course.sources(width) for course in courses], [course.comp(width) for course in courses]
    source = torch.cat([_grid(part, (0,)) for part in parts], dim=1).squeeze(-1).to(device)
    columns = torch.cat([_grid(sinks, NOBODY), _grid([course.columns for course in courses], NOBODY)], dim=1)
    columns = columns.to(device)
    raw_position = torch.cat([at, position], dim=1)
    tables = {
        "source": rotary.tables(raw_position.gather(1, source)),
        "memory": rotary.tables(columns[..., 2]),
    }
    if not one_frame:
        tables |= {"text": rotary.tables(text), "behind": rotary.tables(behind)}
    return OnwardPlan(
        adapter=adapter,
        gate=(index >= 0).flatten().nonzero().squeeze(1)
        if any(course.groups for course in courses)
        else None,
        mask=additive(_visible(columns, whose, segment, index >= 0, seen), dtype),
        courses=courses,
        known=known,
        sink=max(map(len, sinks)),
        source=source,
        columns=columns.shape[1],
        position=position,
        raw_position=raw_position,
        one_frame=one_frame,
        layer_types=rotary.layer_types,
        tables=tables,
    )


def _known(
    courses: Sequence[Course], one_frame: bool, rotary: Rotary, dtype: torch.dtype
) -> tuple[list[list[tuple[Tensor, Tensor]]], Tensor, Tensor]:
    """Of the known text keys and values, as of :class:`OnwardPlan`, its segments and its positions (B, W).

    Tokens of the sink, and padding, belong to segment -1.
    """
    width = max(course.row.sink.length + course.raw for course in courses)
    placed, whose, position = [], [], []
    for course in courses:
        old, empty = course.row.sink.length, width - course.row.sink.length - course.raw
        moved = course.moved(0) if one_frame else 0
        at = torch.cat([torch.arange(old), torch.arange(course.raw) + moved])
        at = at.to(course.row.sink.keys.device)
        placed.append(list(placed_layers(course.known, at, rotary, dtype)))
        lengths = torch.tensor(course.lengths, device=at.device)
        of = torch.arange(len(lengths), device=at.device).repeat_interleave(lengths)[: course.raw]
        whose.append(pad(of, (old, empty), value=-1))
        position.append(pad(at, (0, empty)))
    return placed, torch.stack(whose), torch.stack(position)


def _visible(columns: Tensor, whose: Tensor, segment: Tensor, comp: Tensor, seen: Tensor) -> Tensor:
    """The mask of the pass: (B, 1, Q, s + S + W + Q) bool.

    Args:
        columns: (B, s + S, 3) of sink and slots.
        whose: (B, W) segment of the known text.
        segment, comp, seen: (B, Q) of the tokens: segment, whether it is a COMP token, folds that it sees.
    """
    order = torch.arange(segment.shape[1], device=segment.device)
    query, folds, asks = segment.unsqueeze(-1), seen.unsqueeze(-1), comp.unsqueeze(-1)  # (B, Q, 1)
    memory = (columns[..., 0].unsqueeze(1) <= folds) & (folds <= columns[..., 1].unsqueeze(1))
    raw = torch.cat([whose, segment.masked_fill(comp, -1)], dim=1).unsqueeze(1)
    # text sees the raw text that is not folded yet, a COMP token its own segment alone
    text = torch.where(asks, raw == query, raw >= folds) & (raw >= 0)
    group = asks & comp.unsqueeze(1) & (segment.unsqueeze(1) == query)
    new = text[..., whose.shape[1] :] | group
    # COMP tokens may stand before or behind text of their segment, never before its end
    new = new & (order <= order.unsqueeze(1)) | torch.eye(len(order), dtype=torch.bool, device=order.device)
    return torch.cat([memory, text[..., : whose.shape[1]], new], dim=-1).unsqueeze(1)


def _grid(rows: Sequence[Sequence[tuple[int, ...]]], padding: tuple[int, ...]) -> Tensor:
    """Rows of different lengths as one tensor (B, width, len(padding)), padded at the right."""
    width = max(map(len, rows))
    grid = [[*row, *[padding] * (width - len(row))] for row in rows]
    return torch.tensor(grid, dtype=torch.long).view(len(rows), width, len(padding))


def _gather(states: Tensor, index: Tensor) -> Tensor:
    """Entries (B, H, n, D) of states (B, H, K, D) by index (B, n)."""
    return states.gather(2, index[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))

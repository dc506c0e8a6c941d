"""Rules: how a block of slots is folded into the memory, Mem(t) = g_update(Mem(t-1), h(t)).

A rule is one function, :meth:`Rule.update`, used by the recurrent step and by the parallel pass alike. Keys
reach it position-free (un-rotated), so that what it averages is in one phase. The paper's come first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError, UnknownNameError


class Columns(NamedTuple):
    """The columns that the states of a memory take in the parallel pass, S of them.

    Attributes:
        first, last: (S,) fewest and most folds of the states that a column is in.
        place: (S,) among the slots of these states.
    """

    first: Tensor
    last: Tensor
    place: Tensor


class Rule(ABC):
    """Base of all rules. A subclass gives ``name``, :meth:`update` and :meth:`size`.

    For the parallel pass every state of the memory gets columns of its own (:meth:`columns`, :meth:`placed`). A
    subclass may give both anew, with the same states in fewer columns or in fewer steps.
    """

    name = ""
    #: Segments that have slots of their own before others begin to share them (None: any number).
    blocks: int | None = None
    #: Segments after which information is dropped rather than folded (None: never).
    drops_after: int | None = None

    @abstractmethod
    def update(self, slots: Tensor, block: Tensor, step: int) -> Tensor:
        """Mem(t) from Mem(t-1) of shape (..., m, D), h(t) of shape (..., n, D) and t = ``step`` >= 1."""

    def size(self, steps: int, n: int) -> int:
        """Number of slots after ``steps`` folds of n slots each."""
        return n if steps else 0

    def means(self, steps: int, n: int) -> int:
        """How many of the first slots are running means after ``steps`` folds: rounding them would add up."""
        return 0

    def apart(self, steps: int) -> int:
        """How many of the newest segments have slots that they share with no other, after ``steps`` folds."""
        if self.blocks is None or steps <= self.blocks:
            return steps
        return self.blocks if self.drops_after else self.blocks - 1

    def kept(self, step: int, slots: int, n: int) -> tuple[int, int]:
        """Which of the old slots stay as they are when block ``step`` of n slots goes in.

        Returns:
            the first slot that stays, with all behind it, and its place afterwards; ``(slots, 0)`` if none stays.
            The slots before that place, and the last n, are new.
        """
        return slots, 0

    def columns(self, blocks: Tensor) -> Tensor:
        """The states of the memory side by side: (B, H, G, n, D) -> (B, H, S, D)."""
        states = [blocks[:, :, 0]]
        for g in range(1, blocks.shape[2]):
            states.append(self.update(states[-1], blocks[:, :, g], g + 1))
        return torch.cat(states, dim=2)

    def placed(self, groups: int, n: int) -> Columns:
        """Which states each column is in, and where."""
        return self._states(range(1, groups + 1), n)

    def _states(self, steps: Sequence[int], n: int) -> Columns:
        sizes = [self.size(step, n) for step in steps]
        state = torch.tensor(steps, dtype=torch.long).repeat_interleave(torch.tensor(sizes, dtype=torch.long))
        place = [torch.arange(size) for size in sizes]
        return Columns(state, state, torch.cat(place) if place else state)


class Concat(Rule):
    """CCM-concat: Mem(t) = [Mem(t-1); h(t)] (paper, section 3.1). Grows by n slots a step."""

    name = "concat"

    def update(self, slots: Tensor, block: Tensor, step: int) -> Tensor:
        return torch.cat([slots, block], dim=-2)

    def size(self, steps: int, n: int) -> int:
        return steps * n

    def kept(self, step: int, slots: int, n: int) -> tuple[int, int]:
        return 0, 0

    def columns(self, blocks: Tensor) -> Tensor:
        """A slot never changes and never moves: one column is in all states from its own on."""
        return blocks.flatten(2, 3)

    def placed(self, groups: int, n: int) -> Columns:
        made = torch.arange(1, groups + 1).repeat_interleave(n)
        return Columns(made, torch.full_like(made, groups), torch.arange(groups * n))


class Mean(Rule):
    """CCM-merge: Mem(t) = (1 - 1/t) Mem(t-1) + h(t)/t, the arithmetic mean. Stays at n slots."""

    name = "mean"
    blocks = 1

    def update(self, slots: Tensor, block: Tensor, step: int) -> Tensor:
        return block if step == 1 else slots + (block - slots) / step

    def means(self, steps: int, n: int) -> int:
        return n if steps else 0

    def columns(self, blocks: Tensor) -> Tensor:
        """All at once: an accelerator would wait for its host between one update and the next."""
        return running_means(blocks).flatten(2, 3)


def running_means(blocks: Tensor) -> Tensor:
    """Of the first 1, 2, ... blocks: (B, H, G, n, D) -> the same shape."""
    count = torch.arange(1, blocks.shape[2] + 1, device=blocks.device)
    return blocks.cumsum(2) / count.view(-1, 1, 1)


class EMA(Rule):
    """CCM-merge with a constant weight: Mem(t) = (1 - a) Mem(t-1) + a h(t), Mem(1) = h(1)."""

    name = "ema"
    blocks = 1

    def __init__(self, weight: float = 0.3):
        if not 0 < weight <= 1:
            raise ConfigError(f"rule ema: weight {weight} is not in (0, 1]")
        self.weight = weight

    def update(self, slots: Tensor, block: Tensor, step: int) -> Tensor:
        return block if step == 1 else slots + self.weight * (block - slots)

    def means(self, steps: int, n: int) -> int:
        return n if steps else 0


class Replace(Rule):
    """Mem(t) = h(t): recurrent gisting, the memory is what the last block says."""

    name = "replace"
    blocks = 1

    def update(self, slots: Tensor, block: Tensor, step: int) -> Tensor:
        return block


class Bounded(Rule):
    """Concat with room for ``blocks`` blocks; what overflows is dropped or merged.

    With ``overflow="merge"`` the oldest block is the mean of all that did not fit; with ``"drop"`` it is lost.
    """

    name = "bounded"
    blocks: int

    def __init__(self, blocks: int = 16, overflow: str = "merge"):
        if blocks < 2:
            raise ConfigError(f"rule bounded: got blocks={blocks}, expected at least 2")
        if overflow not in ("merge", "drop"):
            raise UnknownNameError("overflow", overflow, ["merge", "drop"])
        self.blocks = blocks
        self.overflow = overflow
        self.drops_after = blocks if overflow == "drop" else None

    def update(self, slots: Tensor, block: Tensor, step: int) -> Tensor:
        if step <= self.blocks:
            return torch.cat([slots, block], dim=-2)
        n = block.shape[-2]
        if self.overflow == "drop":
            return torch.cat([slots[..., n:, :], block], dim=-2)
        oldest, second = slots[..., :n, :], slots[..., n : 2 * n, :]
        merged = oldest + (second - oldest) / (step - self.blocks + 1)
        return torch.cat([merged, slots[..., 2 * n :, :], block], dim=-2)

    def size(self, steps: int, n: int) -> int:
        return min(steps, self.blocks) * n

    def means(self, steps: int, n: int) -> int:
        return n if self.overflow == "merge" and steps > self.blocks else 0

    def kept(self, step: int, slots: int, n: int) -> tuple[int, int]:
        if step <= self.blocks:
            return 0, 0
        return (n, 0) if self.overflow == "drop" else (2 * n, n)

    def columns(self, blocks: Tensor) -> Tensor:
        """As long as there is room it is concat; after that every state moves all of its slots."""
        groups = blocks.shape[2]
        pool = torch.cat([running_means(blocks), blocks], dim=2) if groups > self.blocks else blocks
        chosen = list(range(min(groups, self.blocks)))
        if groups > self.blocks:
            chosen = [groups + g for g in chosen]
        for gone in range(1, groups - self.blocks + 1):  # blocks that have no place of their own any more
            oldest = gone if self.overflow == "merge" else groups + gone
            chosen += [oldest, *range(groups + gone + 1, groups + gone + self.blocks)]
        return pool.index_select(2, torch.tensor(chosen, device=blocks.device)).flatten(2, 3)

    def placed(self, groups: int, n: int) -> Columns:
        room = Concat().placed(min(groups, self.blocks), n)
        full = self._states(range(self.blocks + 1, groups + 1), n)
        return Columns(*(torch.cat(part) for part in zip(room, full, strict=True)))


RULES: dict[str, type[Rule]] = {rule.name: rule for rule in (Concat, Mean, EMA, Replace, Bounded)}
RULES["merge"] = Mean  # the paper's name for it


def names_of(rule: Rule) -> list[str]:
    """All names under which a rule is registered, its own one before its aliases."""
    return [name for name, kind in RULES.items() if kind is type(rule)]


def get_rule(name: str, **options: Any) -> Rule:
    """The rule registered under ``name``.

    Raises:
        UnknownNameError: no such rule.
        ConfigError: an option that the rule does not have.
    """
    if name not in RULES:
        raise UnknownNameError("rule", name, list(RULES))
    try:
        return RULES[name](**options)
    except TypeError as error:
        raise ConfigError(f"rule {name}: {error}") from error

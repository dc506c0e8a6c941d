"""Every rule by its name: those of the paper (``ccm.core.rule``), and further ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, UnknownNameError
from .rule import Columns, Concat, Mean, Rule, running_means

__all__ = ["EMA", "RULES", "Bounded", "Columns", "Concat", "Mean", "Replace", "Rule", "get_rule", "names_of"]


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

"""Settings of a compressor."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError

#: First raw tokens that stay unless a configuration says otherwise.
SINK = 4


@dataclass(frozen=True)
class CompressorConfig:
    """Everything that defines a compressor.

    Attributes:
        slots: COMP tokens per segment (n). Fewer can be used at run time: the first k of n.
        rule: how blocks enter the memory: concat, mean (alias merge), ema, replace, bounded.
        rule_options: options of the rule, for instance ``{"weight": 0.3}`` for ema.
        sink: first raw tokens that stay for ever, as attention sink; :data:`SINK` by default, 0 for other kinds than
            "ccm", which have slots only.
        window: recent raw tokens that stay beside the slots.
        rank, alpha: of the conditional LoRA.
        target_modules: "attention", "all" (feed-forward too) or a list of module names.
        seed: of the initial weights.
        kind: what slots are made from: "ccm", or that of a baseline (``ccm.methods.baselines``).
    """

    slots: int = 4
    rule: str = "concat"
    rule_options: dict[str, Any] = field(default_factory=dict)
    sink: int = None  # type: ignore[assignment]  # depends on the kind
    window: int = 0
    rank: int = 8
    alpha: float = 16.0
    target_modules: str | tuple[str, ...] = "attention"
    seed: int = 0
    kind: str = "ccm"

    def __post_init__(self) -> None:
        if self.sink is None:
            object.__setattr__(self, "sink", SINK if self.kind == "ccm" else 0)
        for name, least in (("slots", 1), ("rank", 1), ("sink", 0), ("window", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(
                    f"CompressorConfig.{name}: got {value!r}, expected a whole number >= {least}"
                )
        from .rule import get_rule  # needs torch, which takes seconds: a wrong key shows before

        get_rule(self.rule, **self.rule_options)

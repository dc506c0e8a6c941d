"""Settings of a training run."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..compressor import CompressorConfig
from ..errors import ConfigError, UnknownNameError
from .objectives import OBJECTIVES


@dataclass(frozen=True)
class TrainConfig:
    """One run.

    Attributes:
        compressor: what is trained.
        init_from: an adapter (name or folder) whose weights are the start.
        objective: "distill" (KL to the base model with full context) or "ce" (the text itself).
        steps: optimizer steps.
        rows: rows per forward pass.
        accumulate: forward passes per step.
        turns: turns per row to draw from; the first is used for evaluation.
        lr: peak learning rate, reached after ``warmup`` steps, then cosine down to a tenth.
        slot_choices: numbers of slots to draw from at each pass (first k of n); empty means always all.
        window_choices: recent windows, in tokens, to draw from at each pass; empty means the configured one.
        sink_with_window: sink tokens in the passes that have a window.
        facts: share of rows with planted facts that are asked for later.
        echoes: share of rows in which later turns repeat earlier ones.
        recall_weight: weight of the value of a planted fact; such tokens are learned from the text itself, because
            the teacher forgets them too.
        cap_per_user: most conversations of one person.
        eval_every, eval_rows: evaluation on held-out conversations.
        save_every: steps between checkpoints.
        bf16: run the frozen model in bfloat16; the adapter stays in fp32.
        minutes: stop after so many minutes of training; the schedule then follows the clock. 0 means no limit.
        seed: of data order and draws.
    """

    compressor: CompressorConfig = field(default_factory=CompressorConfig)
    init_from: str | None = None
    objective: str = "distill"
    steps: int = 1000
    rows: int = 4
    accumulate: int = 1
    turns: tuple[int, ...] = (10,)
    lr: float = 2e-3
    warmup: int = 20
    weight_decay: float = 0.0
    slot_choices: tuple[int, ...] = ()
    window_choices: tuple[int, ...] = ()
    sink_with_window: int = 4
    facts: float = 0.0
    echoes: float = 0.0
    recall_weight: float = 1.0
    cap_per_user: int = 64
    eval_every: int = 100
    eval_rows: int = 40
    save_every: int = 50
    bf16: bool = True
    minutes: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise UnknownNameError("objective", self.objective, list(OBJECTIVES))
        for name in ("steps", "rows", "accumulate", "save_every", "eval_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"TrainConfig.{name}: got {getattr(self, name)}, expected at least 1")
        if not self.turns or min(self.turns) < 2:
            raise ConfigError(
                f"TrainConfig.turns: got {self.turns}, expected at least 2 each: one folded, one scored"
            )

"""Settings of a training run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ..core.config import CompressorConfig
from ..errors import ConfigError, UnknownNameError

STAGES = ("memory", "base")
OBJECTIVE_NAMES = ("distill", "ce", "target-ce")
RECALL_FROM = ("text", "teacher")
PARALLEL = ("ddp", "fsdp2")

#: What may differ when a run goes on: it changes how long and where the run is made, not what is learned.
FREE = {"steps", "minutes", "save_every", "eval_every", "model", "tensorboard", "push_to_hub", "require"}
FREE |= {"parallel", "compile", "gradient_checkpointing", "data_workers"}


@dataclass(frozen=True)
class TrainConfig:
    """One run.

    Attributes:
        model: folder or hub id of the base model; None is the embedded one.
        stage: "memory" trains a compressor; "base" trains an ordinary LoRA on all tokens with the whole context,
            the paper's first stage.
        compressor: what is trained; stage "base" takes rank, alpha, target_modules and seed from it.
        base_adapter: folder of a first stage that stays active, frozen, under the compressor.
        init_from: an adapter (name or folder) whose weights are the start; its own first stage stays, unless
            ``base_adapter`` names another.
        data: source -> its options, and its ``weight`` in the mixture (1 by default).
        packed: file of ``ccm data pack`` that rows come from; ``data`` is then what it was packed from.
        objective: "distill" (KL to the base model with the whole context), "ce" (the text itself) or "target-ce"
            (the text of the last segment of each row, as in the paper).
        recall_weight: weight of tokens that can only be known from an earlier segment.
        recall_from: what they are learned from: the "text", because a teacher forgets too, or the "teacher", where a
            first stage has taught it to use them.
        reconstruction: weight of writing an earlier segment back from its slots; 0 switches it off.
        reconstruction_share: share of the passes that have such a segment at the end of their rows.
        slot_choices: numbers of slots to draw from at each pass (first k of n); empty means always all.
        rule_choices: rules to draw from at each pass, so that one adapter serves several; empty means its own.
        window_choices: recent windows, in tokens, to draw from at each pass; empty means the configured one.
        sink_choices: numbers of sink tokens to draw from at each pass; empty means the configured one.
        sink_with_window: without ``sink_choices``, sink tokens in the passes that have a window.
        resegment: share of the rows whose segments are joined and split at random.
        recut: share of the rows that are cut into pieces of one length, 16 to 256 tokens, regardless of turns.
        steps: optimizer steps.
        minutes: stop after so many minutes of training; the schedule then follows the clock. 0 means no limit.
        rows: most rows per forward pass.
        tokens_per_batch: most tokens per forward pass, padding counted.
        accumulate: forward passes per step and process.
        data_workers: processes beside each one that draw rows ahead of time; 0 draws them in between.
        lr: peak learning rate, reached after ``warmup`` steps, then cosine down to a tenth.
        weight_decay: of AdamW.
        eval_every: steps between evaluations on held-out rows.
        eval_rows: held-out rows of each source.
        save_every: steps between checkpoints.
        bf16: hold the frozen model in bfloat16; the adapter and its optimizer stay in fp32.
        gradient_checkpointing: keep no activations inside layers, compute them again backwards.
        compile: compile norms and feed-forward blocks with ``torch.compile``.
        parallel: how several processes hold the frozen model: "ddp" (a copy each) or "fsdp2" (its layers sharded).
        tensorboard: write curves beside the log.
        push_to_hub: hub id that the adapter is uploaded to at the end.
        require: figures of the last evaluation -> least value; below it the command fails.
        seed: of data order and draws.

    Raises:
        ConfigError: a value that cannot be used; it names the key.
    """

    model: str | None = None
    stage: str = "memory"
    compressor: CompressorConfig = field(default_factory=CompressorConfig)
    base_adapter: str | None = None
    init_from: str | None = None
    data: dict[str, dict[str, Any]] = field(default_factory=lambda: {"chitchat": {}})
    packed: str | None = None
    objective: str = "distill"
    recall_weight: float = 1.0
    recall_from: str = "text"
    reconstruction: float = 0.0
    reconstruction_share: float = 0.25
    slot_choices: tuple[int, ...] = ()
    rule_choices: tuple[str, ...] = ()
    window_choices: tuple[int, ...] = ()
    sink_choices: tuple[int, ...] = ()
    sink_with_window: int = 4
    resegment: float = 0.0
    recut: float = 0.0
    steps: int = 1000
    minutes: float = 0.0
    rows: int = 4
    tokens_per_batch: int = 4096
    accumulate: int = 1
    data_workers: int = 0
    lr: float = 2e-3
    warmup: int = 20
    weight_decay: float = 0.0
    eval_every: int = 100
    eval_rows: int = 40
    save_every: int = 50
    bf16: bool = True
    gradient_checkpointing: bool = False
    compile: bool = False
    parallel: str = "ddp"
    tensorboard: bool = False
    push_to_hub: str | None = None
    require: dict[str, float] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        # these need torch, which takes seconds; a wrong key of a recipe shows before
        from ..core.rule import get_rule
        from ..methods.baselines import BASELINES

        choices = {
            "stage": STAGES,
            "objective": OBJECTIVE_NAMES,
            "recall_from": RECALL_FROM,
            "parallel": PARALLEL,
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UnknownNameError(name, getattr(self, name), list(known))
        least: dict[str, float] = dict.fromkeys(
            (
                "steps",
                "rows",
                "tokens_per_batch",
                "accumulate",
                "warmup",
                "save_every",
                "eval_every",
                "eval_rows",
            ),
            1,
        )
        least |= dict.fromkeys(
            ("minutes", "data_workers", "weight_decay", "recall_weight", "reconstruction"), 0
        )
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ConfigError(f"TrainConfig.{name}: got {getattr(self, name)}, expected at least {low}")
        for name in ("reconstruction_share", "resegment", "recut"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"TrainConfig.{name}: got {getattr(self, name)}, expected a share, 0 to 1")
        if self.recall_from == "teacher" and (self.objective != "distill" or self.stage != "memory"):
            raise ConfigError(
                f"TrainConfig.recall_from: got 'teacher' with stage {self.stage!r} and objective {self.objective!r}, "
                "which have none; set stage memory and objective distill, or recall_from text"
            )
        if not self.lr > 0:
            raise ConfigError(f"TrainConfig.lr: got {self.lr}, expected more than 0")
        for k in self.slot_choices:
            if not 1 <= k <= self.compressor.slots:
                raise ConfigError(
                    f"TrainConfig.slot_choices: got {k}, expected 1 to compressor.slots = {self.compressor.slots}"
                )
        for rule in self.rule_choices:
            get_rule(rule)
        for name in ("window_choices", "sink_choices"):
            if any(size < 0 for size in getattr(self, name)):
                raise ConfigError(f"TrainConfig.{name}: got {getattr(self, name)}, expected 0 or more each")
        if self.stage == "base" and (self.base_adapter or self.init_from):
            raise ConfigError(
                "TrainConfig.stage: 'base' starts from the plain model; leave base_adapter, init_from out"
            )
        for name in ("window_choices", "rule_choices"):
            if self.compressor.kind != "ccm" and any(getattr(self, name)):
                raise ConfigError(
                    f"TrainConfig.{name}: got {getattr(self, name)}, but compressor.kind "
                    f"{self.compressor.kind!r} is trained with slots of its own rule only; leave it empty"
                )
        if (kind := self.compressor.kind) not in ("ccm", *BASELINES):
            raise UnknownNameError("compressor.kind", kind, ["ccm", *BASELINES])
        if kind != "ccm" and self.gradient_checkpointing:
            raise ConfigError(
                f"TrainConfig.gradient_checkpointing: compressor.kind {kind!r} is trained over a "
                "cache, which checkpointing drops; set it false"
            )
        self._check_data()

    def _check_data(self) -> None:
        if not self.data:
            raise ConfigError("TrainConfig.data: got no source; see `ccm data list`")
        for name, options in self.data.items():
            weight = options.get("weight", 1.0)
            if isinstance(weight, bool) or not isinstance(weight, int | float) or weight <= 0:
                raise ConfigError(
                    f"TrainConfig.data.{name}.weight: got {weight!r}, expected a number above 0"
                )

    @property
    def weights(self) -> dict[str, float]:
        """Source -> its share of the mixture; they sum to 1."""
        given = {name: float(options.get("weight", 1.0)) for name, options in self.data.items()}
        return {name: weight / sum(given.values()) for name, weight in given.items()}

    def options(self, source: str) -> dict[str, Any]:
        """Options of a source, without its weight."""
        return {name: value for name, value in self.data[source].items() if name != "weight"}


def flat(config: TrainConfig) -> dict[str, Any]:
    """The settings with dotted keys: ``compressor.slots``, ``data.chitchat.weight``."""

    def walk(prefix: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict) or not value:
            return {prefix: list(value) if isinstance(value, tuple) else value}
        items: dict[str, Any] = {}
        for name, inner in value.items():
            items |= walk(f"{prefix}.{name}" if prefix else str(name), inner)
        return items

    return walk("", asdict(config))

"""What is trained: a compressor on the frozen model, or, before it, the model itself by an ordinary LoRA.

Both stages answer to the same four names, so that one loop trains either: ``parameters``, ``losses``, ``evaluate``
and ``export``.
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..core.compressor import Compressor
from ..core.devices import is_spread
from ..core.families import get_family, resolve_targets
from ..core.rule import get_rule
from ..core.twin import text_config
from ..encoder_decoder.carrier import EncoderDecoder
from ..errors import ConfigError
from ..files import base_stage
from ..files.adapter_folder import CHANGEABLE, read_config
from ..files.fingerprint import base_name
from ..methods.baselines import BASELINES
from .config import TrainConfig
from .engines import Engine, Padded, make_engine
from .held_out import HeldOut, mean_nll
from .lean import compiles
from .objectives import OBJECTIVES, cross_entropy, summed_loss
from .packed import ArrayRow
from .targets import ECHO, NONE, RECALL, TEXT, Row, find_targets, only_last, recut, resegmented, with_echo
from .written import Written


@dataclass(frozen=True)
class Losses:
    """Of one pass.

    Attributes:
        loss: weighted sum over tokens, with gradient.
        tokens: number of tokens in it.
        recall, recall_tokens: sum over the tokens that only a memory can know, and their number.
    """

    loss: Tensor
    tokens: int
    recall: Tensor
    recall_tokens: int


class Stage(ABC):
    """One of the two stages.

    Attributes:
        parameters: what the optimizer changes.
        best_by: the figure of :meth:`evaluate` that says which weights to keep; more is better.
        figures: figures that a recipe can require.
    """

    parameters: list[nn.Parameter]
    best_by: str
    figures: list[str]

    @abstractmethod
    def prepare(self, rows: Sequence[Row | ArrayRow], draw: random.Random) -> Any:
        """What of a pass over a batch the host does; everything random comes from ``draw``."""

    @abstractmethod
    def run(self, prepared: Any) -> Losses:
        """The losses of a batch that is prepared. Nothing in it waits for the device."""

    def losses(self, rows: Sequence[Row | ArrayRow], draw: random.Random) -> Losses:
        """The losses of a batch."""
        return self.run(self.prepare(rows, draw))

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Figures on held-out rows."""

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Write the trained weights as an adapter folder."""


def make_stage(model: PreTrainedModel, config: TrainConfig, held_out: dict[str, list[Row]]) -> Stage:
    """The stage that a run asks for, on its model."""
    kind = BaseStage if config.stage == "base" else MemoryStage
    return kind(model, config, held_out)


class MemoryStage(Stage):
    """A compressor; the teacher is the same model with the gate closed and the whole context."""

    best_by = "recovered_share"

    def __init__(self, model: PreTrainedModel, config: TrainConfig, held_out: dict[str, list[Row]]):
        self.config = config
        made_by = BASELINES.get(config.compressor.kind, Compressor)
        if config.init_from:
            if (kind := read_config(config.init_from).kind) != config.compressor.kind:
                raise ConfigError(
                    f"TrainConfig.init_from: adapter {config.init_from} is of kind {kind!r}, compressor.kind is "
                    f"{config.compressor.kind!r}; give the same"
                )
            changes = {name: getattr(config.compressor, name) for name in CHANGEABLE}
            self.compressor = made_by.from_pretrained(
                model, config.init_from, base_adapter=config.base_adapter, **changes
            )
        else:
            self.compressor = made_by(model, config.compressor, base_adapter=config.base_adapter)
        if self.compressor.base_parameters:  # frozen, and read twice a step
            base_stage.merge(model)
        if not is_spread(model):
            self.compressor.to(model.device)
        self.parameters = self.compressor.trainable_parameters()
        self.objective = OBJECTIVES[config.objective]
        fuse = compiles(self.compressor.model.device)
        if fuse:
            self.objective = torch.compile(self.objective, dynamic=True)
        self.engine = self._engine(config, fuse)
        self.held_out = HeldOut(held_out, config)
        self.figures = self.held_out.figures

    def _engine(self, config: TrainConfig, fuse: bool) -> Engine:
        if isinstance(self.compressor, EncoderDecoder):
            for name, usual in (("gradient_checkpointing", False), ("compile", False), ("parallel", "ddp")):
                if (got := getattr(config, name)) != usual:
                    raise ConfigError(
                        f"TrainConfig.{name}: got {got!r}, which is for decoders; an encoder-decoder is trained with "
                        f"{usual!r}"
                    )
            return Written(self.compressor)
        if config.parallel == "fsdp2":  # sharded layers must run themselves, to be gathered
            return Padded(self.compressor)
        width = config.tokens_per_batch if fuse else 0
        return make_engine(self.compressor, width, fuse or config.compile, config.gradient_checkpointing)

    def prepare(self, rows: Sequence[Row | ArrayRow], draw: random.Random) -> Any:
        config = self.config
        sizes = self._sizes(draw)  # before what rows draw: halves of a batch have the budget of the whole
        rule = get_rule(draw.choice(config.rule_choices)) if config.rule_choices else None
        varied = [_later(row) for row in self._varied(rows, draw)]
        return self.engine.prepare(varied, rule, config.objective == "distill", **sizes)

    def run(self, prepared: Any) -> Losses:
        config = self.config
        found = self.engine.run(prepared)
        loss, recall = found.student.sum() * 0.0, found.student.new_zeros(())
        for role, weight in ((TEXT, 1.0), (RECALL, config.recall_weight), (ECHO, config.reconstruction)):
            part = found.of(role)
            if not len(part.roles):
                continue
            taught, objective = part.teacher, self.objective
            if role == ECHO or (role == RECALL and config.recall_from == "text"):
                taught, objective = None, cross_entropy
            own = part.student
            value = summed_loss(
                own, own if taught is None else taught, part.ids, self.compressor.head, objective
            )
            loss = loss + weight * value
            if role != TEXT:
                recall = recall + value.detach()
        known = int((found.roles != TEXT).sum())
        return Losses(loss, len(found.roles), recall, known)

    def _varied(self, rows: Sequence[Row | ArrayRow], draw: random.Random) -> list[ArrayRow]:
        """The rows with other boundaries, an echo at the end, or only their last segment scored."""
        config, longest = self.config, self.compressor.context
        echoes = config.reconstruction and draw.random() < config.reconstruction_share
        varied = []
        for row in rows:
            if draw.random() < config.resegment:
                row = resegmented(as_row(row), draw)
            if config.recut and draw.random() < config.recut:
                row = recut(as_row(row), draw)
            if echoes:
                row = with_echo(as_row(row), draw, longest)
            if config.objective == "target-ce":
                row = only_last(as_row(row))
            varied.append(row if isinstance(row, ArrayRow) else ArrayRow.from_row(row))
        return varied

    def _sizes(self, draw: random.Random) -> dict[str, int]:
        config = self.config
        sizes: dict[str, int] = {}
        if config.slot_choices:
            sizes["slots"] = draw.choice(config.slot_choices)
        if config.window_choices and (window := draw.choice(config.window_choices)):
            sizes.update(window=window, sink=config.sink_with_window)
        if config.sink_choices:
            sizes["sink"] = draw.choice(config.sink_choices)
        return sizes

    def evaluate(self) -> dict[str, float]:
        return self.held_out.evaluate(self.engine)

    def export(self, folder: Path) -> None:
        self.compressor.save_pretrained(folder)


class BaseStage(Stage):
    """An ordinary LoRA on all tokens, with the whole context (the paper's first stage)."""

    best_by = "log_likelihood"
    figures = ["log_likelihood"]  # noqa: RUF012

    def __init__(self, model: PreTrainedModel, config: TrainConfig, held_out: dict[str, list[Row]]):
        wanted = config.compressor
        if getattr(model, "peft_config", None):
            raise ConfigError("stage base: the model has an adapter already; load it again without one")
        family = get_family(model)
        lora = LoraConfig(
            r=wanted.rank,
            lora_alpha=wanted.alpha,
            target_modules=resolve_targets(family, wanted.target_modules),
            exclude_modules=family.outside,
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng():
            torch.manual_seed(wanted.seed)
            get_peft_model(model, lora)  # changes the model in place; its wrapper is not needed
        model.peft_config["default"].base_model_name_or_path = base_name(model)
        self.model = model
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.held_out = {name: [row.flat() for row in rows] for name, rows in held_out.items()}
        self.weights = config.weights
        self.recall_weight = config.recall_weight

    def prepare(self, rows: Sequence[Row | ArrayRow], draw: random.Random) -> list[Row]:
        return [as_row(row).flat() for row in rows]

    def run(self, prepared: list[Row]) -> Losses:
        flat = prepared
        hidden, spans = self._run(flat)
        found = find_targets(flat, spans)
        loss, recall = hidden.sum() * 0.0, hidden.new_zeros(())
        for role, weight in ((TEXT, 1.0), (RECALL, self.recall_weight)):
            if len(targets := found[role]):
                part = targets.loss(hidden, None, self._head, cross_entropy)
                loss = loss + weight * part
                recall = recall + part.detach() if role == RECALL else recall
        return Losses(loss, len(found[TEXT]) + len(found[RECALL]), recall, len(found[RECALL]))

    def _run(self, rows: Sequence[Row]) -> tuple[Tensor, list[list[tuple[int, int]]]]:
        lengths = [row.tokens for row in rows]
        most = text_config(self.model.config).max_position_embeddings
        if max(lengths) > most:
            raise ConfigError(f"a row of {max(lengths)} tokens is longer than the model's context of {most}")
        ids = torch.zeros(len(rows), max(lengths), dtype=torch.long)
        for r, row in enumerate(rows):
            ids[r, : lengths[r]] = torch.tensor(row.segments[0])
        # no padding mask: what is padded comes after all that is scored, and causal attention alone is half the work
        device = self.model.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.model.dtype == torch.bfloat16):
            out = self.model.base_model(ids.to(device), use_cache=False)
        return out.last_hidden_state.to(device), [[(0, length)] for length in lengths]

    def _head(self, hidden: Tensor) -> Tensor:
        logits = self.model.get_output_embeddings()(hidden).to(hidden.device)
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def evaluate(self) -> dict[str, float]:
        nll = sum(
            self.weights[name] * mean_nll(rows, self._run, self._head, self.model.device)
            for name, rows in self.held_out.items()
        )
        return {"perplexity": round(math.exp(nll), 3), "log_likelihood": round(-nll, 5)}

    def export(self, folder: Path) -> None:
        base_stage.save(self.model, folder, "default")


def as_row(row: Row | ArrayRow) -> Row:
    """A row as tuples, whichever form it has."""
    return row.to_row() if isinstance(row, ArrayRow) else row


def _later(row: ArrayRow) -> ArrayRow:
    """The row without scores in its first segment, which has nothing to remember."""
    roles = row.roles.copy()
    roles[: row.stops[0]] = NONE
    return row._replace(roles=roles)

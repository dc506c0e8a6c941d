"""The compressor: a conditional LoRA and a few COMP tokens that fold segments into slots.

Two ways to run it, equal to within rounding (the contract of this library):

* parallel, ``compressor(segments=...)``: every fold of a row in one forward pass, for training and scoring;
* recurrent, ``compressor.compress(ids, memory)``: one segment after another, for living conversations.

    h(t)   = g_comp(Mem(t-1), c(t))      keys and values of the COMP tokens, read after c(t)
    Mem(t) = g_update(Mem(t-1), h(t))    a rule: concat, mean, ...
    O(t)   ~ p(. | Mem(t), I(t))         the base model, untouched                       (paper, equations 1-3)
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import LoraConfig, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ConfigError, MismatchError
from ..files import adapter_folder, base_stage
from ..files.fingerprint import mismatch, model_fingerprint
from . import attention, gate, trial
from .config import SINK, CompressorConfig
from .families import resolve_targets
from .head import run_head
from .memory import KV, Memory, Row
from .reader import Ids, Reader
from .rules import get_rule, names_of
from .segments import Layout, lay_out
from .twin import text_config
from .window import joined, overflow

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ParallelOutput:
    """What one parallel pass gives.

    Attributes:
        logits: (B, Q, V) on the grid of ``layout``.
        layout: where each token of each segment is.
    """

    logits: Tensor
    layout: Layout

    def segment_logits(self, row: int, index: int) -> Tensor:
        """(T_segment, V), equal to the recurrent logits of that segment."""
        start, stop = self.layout.spans[row][index]
        return self.logits[row, start:stop]

    @property
    def loss(self) -> Tensor:
        """Mean next-token cross-entropy, nats, inside every segment but the first of each row."""
        logits, targets = [], []
        for row, spans in enumerate(self.layout.spans):
            for index, (start, stop) in enumerate(spans):
                if index or len(spans) == 1:
                    logits.append(self.segment_logits(row, index)[:-1])
                    targets.append(self.layout.input_ids[row, start + 1 : stop])
        if not sum(map(len, targets)):
            raise ConfigError("no loss: every scored segment has one token; give segments of two or more")
        return nn.functional.cross_entropy(torch.cat(logits).float(), torch.cat(targets))


class Compressor(Reader):
    """Folds segments of any causal language model's context into a small memory.

    The model is changed in place: closed LoRA layers are injected and its attention backend is wrapped. As
    long as no COMP token runs, its outputs stay the same bit for bit. Once made, it may be used by many threads at a
    time (``ccm.core.gate``).

    Args:
        model: a causal language model of a supported family (``ccm.core.families``).
        config: settings; the weights start untrained.
        base_adapter: folder or hub id of a PEFT LoRA that tunes the base model itself (the paper's first stage);
            it is active on all tokens, and frozen.

    Attributes:
        source: the adapter that its weights are loaded from; empty if they are its own.

    Raises:
        UnsupportedModelError: the family cannot carry a memory.
        ConfigError: there is no such base adapter.
        MismatchError: the base adapter does not fit the model, or the model has another one.
    """

    #: What blocks are made from, and the file of an adapter that has the weights for it beside the LoRA.
    kind: ClassVar[str] = "ccm"
    part: ClassVar[str] = "comp_embeddings"

    def __init__(
        self,
        model: PreTrainedModel,
        config: CompressorConfig | None = None,
        base_adapter: str | os.PathLike[str] | None = None,
    ):
        super().__init__(model)
        self.base_parameters = [] if base_adapter is None else base_stage.attach(model, base_adapter)
        self.config = config or CompressorConfig()
        if self.config.kind != self.kind:
            raise ConfigError(f"CompressorConfig.kind: got {self.config.kind!r}, expected {self.kind!r}")
        self.rule = get_rule(self.config.rule, **self.config.rule_options)
        self.adapter = f"ccm{len(getattr(model, 'peft_config', {}))}"
        lora = LoraConfig(
            r=self.config.rank,
            lora_alpha=self.config.alpha,
            target_modules=resolve_targets(self.family, self.config.target_modules),
            exclude_modules=self.family.outside,
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng():
            torch.manual_seed(self.config.seed)
            self.lora_parameters = gate.attach(model, lora, self.adapter, self.family.attention)
            # COMP embeddings start like words of the vocabulary: same mean, same spread
            table = model.get_input_embeddings().weight.detach().float()
            noise = torch.randn(self.config.slots, table.shape[1]).to(table.device)
            self.comp_embeddings = nn.Parameter(table.mean(0) + table.std(0) * noise)
        self.source = ""
        self._prints: tuple[Any, tuple[str, ...]] | None = None
        ends = model.generation_config.eos_token_id
        known = (text_config(model.config).bos_token_id, *(ends if isinstance(ends, list) else [ends]))
        self._special = {token for token in known if token is not None}
        self._warned = self._trained = False

    # ------------------------------------------------------------------ the two ways to run

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The adapter's parameters: LoRA matrices and COMP embeddings."""
        return [*self.lora_parameters, self.slot_parameter]

    @property
    def slot_parameter(self) -> nn.Parameter:
        """What the adapter has beside its LoRA: the COMP embeddings (n, d)."""
        return self.comp_embeddings

    def forward(
        self,
        segments: Sequence[Sequence[Sequence[int]]],
        *,
        slots: int | None = None,
        sink: int | None = None,
        window: int | None = None,
    ) -> ParallelOutput:
        """One parallel pass over rows of segments of token ids; every segment but the last is folded.

        Args:
            segments: B rows of segments of token ids.
            slots, sink, window: other sizes than the configured ones.

        Raises:
            ConfigError: an empty row or segment, or a row longer than the model's context.
        """
        layout = self.lay_out(segments, slots=slots, sink=sink, window=window)
        hidden = self.hidden(layout)
        return ParallelOutput(self.head(hidden), layout)

    def lay_out(self, segments: Sequence[Sequence[Sequence[int]]], **sizes: int | None) -> Layout:
        """The rows as a :class:`Layout` on the model's device."""
        chosen = {name: self.size(name, sizes.get(name)) for name in ("slots", "sink", "window")}
        layout = lay_out(segments, rule=self.rule, **chosen)
        self.check_length(int(layout.rope_position.max()) + 1)
        self.check_ids(layout.input_ids)
        return layout.to(self.model.device)

    def hidden(self, layout: Layout) -> Tensor:
        """Last hidden states (B, Q, d) of one parallel pass."""
        plan = attention.ParallelPlan.build(self.adapter, layout, self.rule, self.rotary, self.model.dtype)
        embeds = self.model.get_input_embeddings()(layout.input_ids)
        comp = self.comp_embeddings.to(embeds.dtype)[layout.comp.clamp(min=0)]
        embeds = torch.where((layout.comp >= 0).unsqueeze(-1), comp, embeds)
        return self.body(
            inputs_embeds=embeds,
            attention_mask=plan.mask,
            position_ids=layout.rope_position,
            use_cache=False,
            **{attention.PLAN: plan},
        ).last_hidden_state.to(self.model.device)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) from last hidden states (..., d), as the model's own forward pass makes them."""
        return run_head(self.model, hidden).to(hidden.device)

    @torch.no_grad()
    def compress(
        self,
        input_ids: Ids,
        memory: Memory | None = None,
        attention_mask: Tensor | None = None,
        *,
        slots: int | None = None,
        sink: int | None = None,
        window: int | None = None,
    ) -> Memory:
        """Take in one segment per row: Mem(t) from Mem(t-1) and c(t).

        The segment joins the recent window; the oldest segments that no longer fit there are folded. With a
        window of 0 that is the segment itself, in one forward pass.

        Args:
            input_ids: (B, T) token ids.
            memory: of B conversations, None at the start.
            attention_mask: (B, T), 0 on padding at either side.
            slots, sink, window: other sizes than the configured ones.

        Raises:
            ConfigError: an empty segment, or one longer than the model's context.
            MismatchError: the memory was made by another model or adapter.
        """
        ids, mask, _, memory = self.prepare(input_ids, memory, attention_mask)
        if not self._trained:
            self._check_trained()
        n = self.size("slots", slots)
        self.check_room(memory, ids.shape[1], n)
        sink, window = self.size("sink", sink), self.size("window", window)
        if not sink:
            self._check_first(memory, ids, mask)
        return self.advance(memory, ids, mask, n, sink, window)

    def advance(self, memory: Memory, ids: Tensor, mask: Tensor, n: int, sink: int, window: int) -> Memory:
        """:meth:`compress` of left-padded text (B, T), unchecked, with gradients."""
        lengths = mask.sum(1).tolist()
        at_once = all(
            not row.segments and length > window for row, length in zip(memory.rows, lengths, strict=True)
        )
        # what is folded at once needs no raw keys, but for those that stay as the sink
        new = self.blocks(memory, ids, mask, n, sink) if at_once else self.step(memory, ids, mask, None)
        rows = [
            joined(row, raw, length) for row, (raw, _), length in zip(memory.rows, new, lengths, strict=True)
        ]
        if at_once:
            rows = [self.put(row, block, sink) for row, (_, block) in zip(rows, new, strict=True)]
        while full := [r for r, row in enumerate(rows) if overflow(row.segments, window)]:
            oldest = [replace(rows[r], window=rows[r].window.slice(0, rows[r].segments[0])) for r in full]
            none = ids.new_empty(len(full), 0)
            new = self.blocks(replace(memory, rows=tuple(oldest)), none, none.bool(), n)
            for r, (_, block) in zip(full, new, strict=True):
                rows[r] = self.put(rows[r], block, sink)
        return Memory(tuple(rows), self.fingerprint())

    def blocks(
        self, memory: Memory, ids: Tensor, mask: Tensor, n: int, keep: int | None = None
    ) -> list[tuple[KV, KV]]:
        """Per row the raw KV of its text, or of the first ``keep`` tokens, and h(t), its block of n slots."""
        return self.step(memory, ids, mask, self.comp_embeddings[:n], keep, gate=slice(ids.shape[1], None))

    def know(self, tokenizer: Any) -> None:
        """Learn the tokenizer's special tokens: a text that begins with one needs no sink, attention rests on it."""
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self._special |= {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}

    def _check_trained(self) -> None:
        """Warn, once, if the LoRA still is as it was made: its B matrices are zero."""
        self._trained = True
        if not any(up.any() for up in self.lora_parameters[1::2]):
            log.warning(
                "the compressor has no weights yet: its slots are noise; train it (ccm train), load an adapter "
                "(Compressor.from_pretrained), or take a memory that needs no training (Session.open)"
            )

    def _check_first(self, memory: Memory, ids: Tensor, mask: Tensor) -> None:
        """Warn, once, of a conversation that begins with an ordinary token, none of which will stay."""
        if self._warned or self.kind != "ccm":
            return
        new = [r for r, row in enumerate(memory.rows) if not row.steps and not row.segments]
        if any(int(ids[r][mask[r]][0]) not in self._special for r in new):
            self._warned = True
            log.warning(
                "a text that begins without a special token is folded with sink=0: once it is in slots, attention "
                "has no first token to rest on, and the memory may be worse than none; give sink=%d, or begin with "
                "the template's first token",
                SINK,
            )

    def put(self, row: Row, block: KV, sink: int) -> Row:
        """Put the block of the oldest raw segment into the slots and let go of its raw tokens."""
        row = self.counted(row)
        step, length = row.steps + 1, row.segments[0]
        recent = () if self.rule.blocks is None else (*row.recent, length)
        gone = recent[: max(0, len(recent) - self.rule.apart(step))]  # they have no slots of their own now
        dropped, merged = (gone, ()) if self.rule.drops_after else ((), gone)
        return Row(
            sink=row.window.slice(0, min(sink, length)) if step == 1 else row.sink,
            slots=KV(*(self.rule.update(old, new, step) for old, new in zip(row.slots, block, strict=True))),
            window=row.window.slice(length),
            segments=row.segments[1:],
            steps=step,
            tokens=row.tokens + length,
            dropped=row.dropped + sum(dropped),
            merged=row.merged + sum(merged),
            merged_segments=row.merged_segments + len(merged),
            recent=recent[len(gone) :],
        )

    def counted(self, row: Row) -> Row:
        """The row with all of its counters, also if a file from before they were kept has brought it."""
        return row if self.rule.blocks is None else row.counted(self.rule.apart(row.steps))

    # ------------------------------------------------------------------ identity, files

    def fingerprint(self) -> str:
        """``model-adapter``: two short hashes that a memory carries, so that it is never read by another pair."""
        return self.fingerprints()[0]

    def fingerprints(self) -> tuple[str, ...]:
        """What a memory of this pair may carry, today's first: an alias of the rule once had a hash of its own."""
        state = [self.slot_parameter, *self.lora_parameters, *self.base_parameters]
        # weights made under inference_mode have no version, and cannot change in place outside it
        version = tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in state)
        if self._prints is None or self._prints[0] != version:
            made = (
                f"{model_fingerprint(self.model)}-{self._hash(name, state)}" for name in names_of(self.rule)
            )
            self._prints = (version, tuple(made))
        return self._prints[1]

    def _hash(self, rule: str, state: Sequence[Tensor]) -> str:
        # sizes may change while a memory lives; the rule may not; "after" and True stand for options of the past
        meaning: list[Any] = [rule, self.config.rule_options, "after"]
        if self.kind != "ccm":
            meaning += [self.kind, True]
        sha = hashlib.sha256(json.dumps(meaning, sort_keys=True).encode())
        for parameter in state:
            sha.update(parameter.detach().float().cpu().numpy().tobytes())
        return sha.hexdigest()[:16]

    def check(self, memory: Memory, batch: int | None = None) -> None:
        """Raises MismatchError unless this model and adapter made the memory, ConfigError on a wrong batch size."""
        if memory.fingerprint not in self.fingerprints():
            raise mismatch(memory.fingerprint, self.fingerprint())
        super().check(memory, batch)

    def save_pretrained(self, folder: str | os.PathLike[str], dtype: torch.dtype = torch.bfloat16) -> None:
        """Write a PEFT adapter folder with ``comp_embeddings.safetensors`` and ``ccm_config.json`` beside it.

        A base adapter goes into its folder ``base/``.

        Raises:
            StorageError: it cannot be written.
        """
        adapter_folder.save(
            Path(folder),
            self.model,
            self.adapter,
            self.config,
            {self.part: self.slot_parameter.detach().to(dtype).cpu()},
            tuned=bool(self.base_parameters),
            dtype=dtype,
        )

    @classmethod
    def from_pretrained(
        cls,
        model: PreTrainedModel,
        name: str | os.PathLike[str],
        base_adapter: str | os.PathLike[str] | None = None,
        **changes: Any,
    ) -> Compressor:
        """Load a shipped adapter by name, or one from a folder or a hub id.

        Args:
            model: the base model it was trained for.
            name: "ccm-concat", "ccm-merge", a folder, or a hub id.
            base_adapter: a first stage in place of the adapter's own; where training on top of another one begins.
            changes: of slots, rule, rule_options, sink and window, for instance ``window=64``. Another rule
                begins with its own default options.

        Raises:
            ConfigError: there is no such adapter, or it is damaged.
            MismatchError: it was trained for another model.
        """
        found = adapter_folder.read(name, model, changes, cls.kind, cls.part)
        compressor = cls(model, found.config, base_adapter=base_adapter or found.base)
        compressor.load_weights(found.lora, found.slots[cls.part])
        if not base_adapter and not changes.keys() & {"rule", "rule_options"}:
            compressor.source = os.fspath(name)
        return compressor

    def load_weights(self, lora: dict[str, Tensor], slots: Tensor) -> None:
        """Put trained weights in place.

        Args:
            lora: by PEFT's names.
            slots: as :attr:`slot_parameter`; of (n, d) COMP embeddings the first ``config.slots`` are used.

        Raises:
            MismatchError: some weights are missing or fit nowhere.
        """
        result = set_peft_model_state_dict(self.model, lora, adapter_name=self.adapter)
        missing = [key for key in result.missing_keys if f".{self.adapter}." in key]
        if missing or result.unexpected_keys:
            raise MismatchError(
                f"the adapter's weights do not fit: {(missing or result.unexpected_keys)[:2]}"
            )
        self.slot_parameter.data.copy_(slots[: len(self.slot_parameter)])

    # ------------------------------------------------------------------ small things

    def size(self, name: str, value: int | None = None) -> int:
        """Slots, sink or window: the configured number unless another one is given, which is checked."""
        most = self.config.slots if name == "slots" else None
        value = getattr(self.config, name) if value is None else value
        if value < (name == "slots") or (most is not None and value > most):
            raise ConfigError(f"{name}: got {value}, expected {'1' if most else '0'} to {most or 'any size'}")
        return value


trial.make = lambda model: Compressor(model, CompressorConfig(slots=2))

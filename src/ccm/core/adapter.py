"""A trained adapter on a model: its weights, the files that they are in, and the hash that memories carry."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from peft import LoraConfig, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ConfigError, MismatchError
from ..files import adapter_folder, base_stage
from ..files.fingerprint import mismatch, model_fingerprint
from . import lora
from .cautions import Cautions
from .config import CompressorConfig
from .families import resolve_targets
from .memory import Memory
from .reader import Reader
from .rule import get_rule, names_of

_Self = TypeVar("_Self", bound="Adapted")


class Adapted(Reader):
    """A reader whose model has a conditional LoRA and COMP embeddings.

    The model is changed in place: closed LoRA layers are injected and its attention backend is wrapped. As long as no
    COMP token runs, its outputs stay the same bit for bit.

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
        config_of_lora = LoraConfig(
            r=self.config.rank,
            lora_alpha=self.config.alpha,
            target_modules=resolve_targets(self.family, self.config.target_modules),
            exclude_modules=self.family.outside,
            task_type="SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM",
        )
        with torch.random.fork_rng():
            torch.manual_seed(self.config.seed)
            self.lora_parameters = lora.attach(model, config_of_lora, self.adapter, self.family.attention)
            # COMP embeddings start like words of the vocabulary: same mean, same spread
            table = model.get_input_embeddings().weight.detach()
            # of a model without its weights (ccm.models.hollow) two rows show all that there is
            table = (table if any(table.stride()) else table[:2]).float()
            noise = torch.randn(self.config.slots, table.shape[1]).to(table.device)
            self.comp_embeddings = nn.Parameter(table.mean(0) + table.std(0) * noise)
        self.source = ""
        self.cautions = Cautions(model)
        self._prints: tuple[Any, tuple[str, ...]] | None = None

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The adapter's parameters: LoRA matrices and COMP embeddings."""
        return [*self.lora_parameters, self.slot_parameter]

    @property
    def slot_parameter(self) -> nn.Parameter:
        """What the adapter has beside its LoRA: the COMP embeddings (n, d)."""
        return self.comp_embeddings

    def size(self, name: str, value: int | None = None) -> int:
        """Slots, sink or window: the configured number unless another one is given, which is checked."""
        own = getattr(self.config, name)
        least, most = (1, own) if name == "slots" else (0, None)
        if value is not None and (value < least or (most and value > most)):
            raise ConfigError(f"{name}: got {value}, expected {least} to {most or 'any size'}")
        return own if value is None else value

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
        cls: type[_Self],
        model: PreTrainedModel,
        name: str | os.PathLike[str],
        base_adapter: str | os.PathLike[str] | None = None,
        **changes: Any,
    ) -> _Self:
        """Load an adapter.

        Args:
            model: the base model it was trained for.
            name: a shipped one, such as "ccm-concat", a folder, or a hub id.
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

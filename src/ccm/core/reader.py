"""Reading from a memory: the base model, untouched, with the memory as past keys and values.

Compressor and reader are separate. Everything here works with the plain model and no adapter; whatever can take
a prefix of keys and values can stand in its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
from . import attention
from .attention import Asked
from .carrier import Carrier, Ids
from .known import Known
from .live import Live
from .memory import KV, Memory
from .room import CACHE
from .rotary import unrotate

__all__ = ["Ids", "Reader", "Known"]


class Reader(Carrier):
    """A causal language model that reads memories."""

    #: Whether it can take several segments in with one pass (:mod:`ccm.core.onward`).
    parallel: ClassVar[bool] = True

    @torch.no_grad()
    def logits(
        self,
        input_ids: Ids,
        memory: Memory | None = None,
        attention_mask: Tensor | None = None,
        begin: int | Sequence[int] = 1,
    ) -> Tensor:
        """Logits (B, T, V) of live tokens that read the memory; no adapter takes part.

        Args:
            input_ids: (B, T) token ids.
            memory: of B conversations; None is an empty one.
            attention_mask: (B, T), 0 on padding at either side.
            begin: where an encoder-decoder begins to write (``ccm.encoder_decoder``); to decoders it is the same.
        """
        ids, mask, order, memory = self.prepare(input_ids, memory, attention_mask)
        _, call = self.live(memory).ahead(mask, self.adapter)
        out = self.model(input_ids=ids, **call).logits
        back = order.argsort(1).unsqueeze(-1).expand_as(out)
        return out.gather(1, back)

    @torch.no_grad()
    def read(
        self, input_ids: Ids, memory: Memory | None = None, attention_mask: Tensor | None = None
    ) -> list[KV]:
        """Position-free keys and values of live tokens that read the memory, one (L, H, T, D) pair per row."""
        ids, mask, _, memory = self.prepare(input_ids, memory, attention_mask)
        return [raw for raw, _ in self.step(memory, ids, mask, None)]

    @torch.no_grad()
    def watch(
        self,
        input_ids: Ids,
        memory: Memory | None = None,
        attention_mask: Tensor | None = None,
        newest: int = -1,
    ) -> list[tuple[KV, Tensor]]:
        """As :meth:`read`, with the queries of the newest tokens; -1: of all.

        Returns:
            per row position-free keys and values (L, H, T, D), and position-free queries (L, Hq, w, D) in fp32.
        """
        ids, mask, _, memory = self.prepare(input_ids, memory, attention_mask)
        seen: dict[int, Asked] = {}
        texts = self.step(memory, ids, mask, None, asked=seen)
        start = torch.tensor([row.length for row in memory.rows], device=ids.device)
        result = []
        for r, (text, _) in enumerate(texts):
            first = 0 if newest < 0 else max(0, text.length - newest)
            column = ids.shape[1] - text.length + first
            queries = torch.stack([seen[i].queries[r, :, column:].to(ids.device) for i in range(len(seen))])
            at = start[r] + torch.arange(first, text.length, device=ids.device)
            result.append((text, unrotate(queries, *self.rotary.stacked(at))))
        return result

    @torch.no_grad()
    def generate(
        self,
        input_ids: Ids,
        memory: Memory | None = None,
        attention_mask: Tensor | None = None,
        **generate_kwargs: Any,
    ) -> Any:
        """transformers' ``generate`` reading from a memory; the memory is not changed.

        Returns:
            what ``generate`` returns: (B, T + new) token ids, the prompt first, left-padded.

        Raises:
            ConfigError: memory, prompt and ``max_new_tokens`` together are longer than the model's context, or
                ``use_cache=False``.
        """
        return self._generate(input_ids, memory, attention_mask, generate_kwargs)[0]

    @torch.no_grad()
    def write(
        self, input_ids: Sequence[int], memory: Memory, **generate_kwargs: Any
    ) -> tuple[Tensor, KV | None]:
        """:meth:`generate` of one row without beams.

        Returns:
            its token ids (B, T + new) with B = 1, and the position-free keys and values (L, H, t, D) of those that
            were read on the way, all but the last; None: they are not at hand, and are read again.
        """
        out, live = self._generate([list(input_ids)], memory, None, generate_kwargs)
        return out, live.grown().read(0, memory.length, self.rotary)

    def _generate(
        self,
        input_ids: Ids,
        memory: Memory | None,
        attention_mask: Tensor | None,
        generate_kwargs: dict[str, Any],
    ) -> tuple[Any, Live]:
        ids, mask, _, memory = self.prepare(input_ids, memory, attention_mask)
        settings = generate_kwargs.get("generation_config") or self.model.generation_config
        new = generate_kwargs.get("max_new_tokens") or settings.max_new_tokens or 0
        self.check_room(memory, ids.shape[1], new, "ask for fewer new tokens (max_new_tokens)")
        if not generate_kwargs.get("use_cache", True):
            raise ConfigError("use_cache: got False, expected True: the memory is read from the cache")
        live, call = self.live(memory).ahead(mask, self.adapter)
        setattr(call[CACHE], attention.PLAN, call.pop(attention.PLAN))
        return self.model.generate(ids, **call, **generate_kwargs), live

    def step(
        self,
        memory: Memory,
        ids: Tensor,
        mask: Tensor,
        comp: Tensor | None,
        keep: int | None = None,
        gate: slice | None = None,
        asked: dict[int, Asked] | None = None,
    ) -> list[tuple[KV, KV]]:
        """Run left-padded text over the memory, then embeddings.

        Args:
            memory: of B conversations.
            ids, mask: (B, T).
            comp: (n, d) or (B, n, d).
            keep: so many tokens of the text are wanted, all by default.
            gate: columns on which the adapter acts.
            asked: filled as :class:`ccm.core.attention.Plan` says.

        Returns:
            per row the position-free KV of its text (of the first ``keep`` tokens), in the model's dtype, and of
            its COMP tokens, in fp32.
        """
        n = 0 if comp is None else comp.shape[-2]
        embeds, shown = self.model.get_input_embeddings()(ids), mask
        if comp is not None:
            embeds = torch.cat([embeds, comp.to(embeds.dtype).expand(len(ids), -1, -1)], dim=1)
            shown = torch.cat([mask, mask.new_ones(len(ids), n)], dim=1)
        live, call = self.live(memory).ahead(shown, self.adapter, gate)
        call[attention.PLAN].asked = asked
        if not torch.is_grad_enabled():  # what the last layer puts out is of no use here
            call[attention.PLAN].stop_at = len(self.family.attention) - 1
        with suppress(attention.StatesDone):
            self.body(inputs_embeds=embeds, **call)
        result = []
        for r in range(len(ids)):
            text = mask[r].nonzero().squeeze(1)[:keep]
            new = torch.cat([text, torch.arange(n, device=ids.device) + ids.shape[1]])
            kv = live.taken(r, new + memory.length, self.rotary)
            raw, block = kv.slice(0, len(text)), kv.slice(len(text))
            result.append((raw.to(self.model.dtype), block.to(torch.float32)))
        return result

    def live(self, memory: Memory) -> Live:
        """A cache that holds the memory, for a pass over it.

        Raises:
            ConfigError: the model is trained with gradient checkpointing, where its layers leave the cache out.
        """
        if self.model.training and self.model.is_gradient_checkpointing:
            raise ConfigError(
                "the model is in training mode with gradient checkpointing, which reads no cache and so no memory: "
                "call model.eval() first"
            )
        return Live.over(memory, self.rotary, self.model.dtype, self.devices)

"""Reading and making memories with an encoder-decoder model: what of the core's reader and compressor is different.

The decoder is untouched. It finds the keys and values of the memory, and of what the encoder reads now, in the cache
of its cross-attention, where transformers keeps them anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from ..core.attention import PLAN, Places
from ..core.devices import is_spread
from ..core.families import Family
from ..core.head import ParallelOutput, run_head
from ..core.live import Live
from ..core.memory import KV, Memory
from ..core.reader import Ids
from ..core.room import CACHE
from ..core.segments import Layout, left_padded
from ..errors import ConfigError, UnsupportedModelError
from .family import Unturned, distance_tables, find, kv_shape, moved, start_token
from .passes import EncoderPlan, Rows, States, over

if TYPE_CHECKING:
    from ..core.compressor import Compressor

    _Base = Compressor
else:
    _Base = object


class EncoderDecoder(_Base):
    """In front of a reader or a compressor of the core: it is made by ``Reader(model)`` and ``Compressor(model)``."""

    two_sided = True
    parallel = False

    def measured(self) -> tuple[Family, Any]:
        """The model's encoder, and what stands in for a rotary embedding."""
        if (kind := getattr(self, "kind", "ccm")) != "ccm":
            raise UnsupportedModelError(
                f"kind {kind!r} is made of decoders: expected 'ccm' for an encoder-decoder"
            )
        if is_spread(self.model):
            raise ConfigError("an encoder-decoder model must be on one device: load it without a device map")
        family = find(self.model)
        start_token(self.model)
        return family, Unturned(self.kv_shape()[0])

    def kv_shape(self) -> tuple[int, int, int]:
        """Layers, heads and their size: those of the encoder, then those in which the decoder reads the encoder."""
        return kv_shape(self.model)

    def kv_bytes_per_token(self) -> int:
        """Bytes of one token of full context: what the decoder reads of it; its encoder keeps nothing."""
        _, heads, size = self.kv_shape()
        return 2 * self._decoder_layers * heads * size * self.model.dtype.itemsize

    @property
    def _encoder_layers(self) -> int:
        return len(self.family.attention)

    @property
    def _decoder_layers(self) -> int:
        return self.kv_shape()[0] - self._encoder_layers

    def watch(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Queries: there are none for the layers of the decoder before it writes."""
        raise UnsupportedModelError(
            "an encoder-decoder shows no queries of what it reads: its decoder has none yet"
        )

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) from last hidden states (..., d) of the decoder."""
        return run_head(self.model, hidden).to(hidden.device)

    # ------------------------------------------------------------------ reading

    @torch.no_grad()
    def logits(
        self,
        input_ids: Ids,
        memory: Memory | None = None,
        attention_mask: Tensor | None = None,
        begin: int | Sequence[int] = 1,
    ) -> Tensor:
        """Logits (B, T, V) of live tokens: as of a decoder, those at t foresee the token at t + 1.

        Args:
            input_ids, memory, attention_mask: as for decoders.
            begin: tokens of every row, or of each, that the encoder reads; the decoder writes the others. Logits
                before the last token that is read are NaN.

        Raises:
            ConfigError: ``begin`` is not between 1 and the length of a row.
        """
        ids, mask, order, memory = self.prepare(input_ids, memory, attention_mask)
        texts = [row[real].tolist() for row, real in zip(ids, mask, strict=True)]
        begins = [begin] * len(texts) if isinstance(begin, int) else list(begin)
        if len(begins) != len(texts) or any(not 1 <= b <= len(t) for b, t in zip(begins, texts, strict=True)):
            raise ConfigError(
                f"begin: got {begin} for rows of {[*map(len, texts)]} tokens, expected 1 to their length"
            )
        hidden = self.written(
            self.live(memory),
            torch.tensor([row.window.length for row in memory.rows], device=ids.device),
            [text[:b] for text, b in zip(texts, begins, strict=True)],
            [text[b:] for text, b in zip(texts, begins, strict=True)],
        )
        made = self.head(hidden)
        out = made.new_full((*ids.shape, made.shape[-1]), torch.nan)
        for r, (text, b) in enumerate(zip(texts, begins, strict=True)):
            first = ids.shape[1] - len(text) + b - 1
            out[r, first:] = made[r, : len(text) - b + 1]
        return out.gather(1, order.argsort(1).unsqueeze(-1).expand_as(out))

    @torch.no_grad()
    def generate(
        self,
        input_ids: Ids,
        memory: Memory | None = None,
        attention_mask: Tensor | None = None,
        **generate_kwargs: Any,
    ) -> Any:
        """What the decoder writes to a prompt that the encoder reads; arguments, result and errors as for decoders.

        Criteria to stop see the prompt in front, as they do there; logits processors see what the decoder wrote.
        """
        ids, mask, _, memory = self.prepare(input_ids, memory, attention_mask)
        settings = generate_kwargs.get("generation_config") or self.model.generation_config
        new = generate_kwargs.get("max_new_tokens") or settings.max_new_tokens or 0
        self.check_room(memory, ids.shape[1], new, "ask for fewer new tokens (max_new_tokens)")
        if not generate_kwargs.get("use_cache", True):
            raise ConfigError("use_cache: got False, expected True: the memory is read from the cache")
        windows = torch.tensor([row.window.length for row in memory.rows], device=ids.device)
        cache, valid = self._crossing(self.live(memory), windows, ids, mask)
        repeat = max(
            generate_kwargs.get(name) or getattr(settings, name, None) or 1
            for name in ("num_beams", "num_return_sequences")
        )
        if repeat > 1:
            cache.cross_attention_cache.batch_repeat_interleave(repeat)
        prompt = ids.repeat_interleave(repeat, dim=0)

        def behind(criterion: Any) -> Any:
            return lambda words, scores, **kwargs: criterion(
                torch.cat([prompt[: len(words)], words[:, 1:]], dim=1), scores, **kwargs
            )

        if "stopping_criteria" in generate_kwargs:
            generate_kwargs["stopping_criteria"] = list(map(behind, generate_kwargs["stopping_criteria"]))
        out = self.model.generate(
            encoder_outputs=BaseModelOutput(last_hidden_state=self._unread(valid)),
            attention_mask=valid.long(),
            **{CACHE: cache},
            **generate_kwargs,
        )
        words = out if isinstance(out, Tensor) else out.sequences
        whole = torch.cat([ids.repeat_interleave(len(words) // len(ids), dim=0), words[:, 1:]], dim=1)
        if isinstance(out, Tensor):
            return whole
        out.sequences = whole
        return out

    def write(
        self, input_ids: Sequence[int], memory: Memory, **generate_kwargs: Any
    ) -> tuple[Tensor, KV | None]:
        """As :meth:`ccm.Reader.write`, and nothing of what was read: the encoder reads them anew."""
        return self.generate([list(input_ids)], memory, **generate_kwargs), None

    def step(
        self,
        memory: Memory,
        ids: Tensor,
        mask: Tensor,
        comp: Tensor | None,
        keep: int | None = None,
        gate: slice | None = None,
        asked: Any = None,
    ) -> list[tuple[KV, KV]]:
        """As of decoders: run left-padded text over the memory, then embeddings."""
        n = 0 if comp is None else comp.shape[-2]
        windows = torch.tensor([row.window.length for row in memory.rows], device=ids.device)
        made = self._read(self.live(memory), windows, ids, mask, comp, gate)
        keys, values = (torch.stack(part) for part in zip(*made, strict=True))
        result = []
        for r in range(len(ids)):
            text = mask[r].nonzero().squeeze(1)[:keep]
            new = torch.cat([text, torch.arange(n, device=ids.device) + ids.shape[1]])
            kv = KV(keys[:, r].index_select(2, new), values[:, r].index_select(2, new))
            raw, block = kv.slice(0, len(text)), kv.slice(len(text))
            result.append((raw.to(self.model.dtype), block.to(torch.float32)))
        return result

    def written(
        self, live: Live, windows: Tensor, read: Sequence[Sequence[int]], words: Sequence[Sequence[int]]
    ) -> Tensor:
        """Last hidden states (B, 1 + W, d) of the decoder: the k-th foresees word k of its row.

        Args:
            live: what the rows have read before.
            windows: (B,) raw tokens in it.
            read: token ids that the encoder reads now.
            words: token ids that the decoder has written.
        """
        device = self.model.device
        cache, valid = self._crossing(live, windows, *left_padded(read, device))
        start = start_token(self.model)
        given = pad_sequence([torch.tensor([start, *row], device=device) for row in words], batch_first=True)
        out = self.model.get_decoder()(
            input_ids=given,
            encoder_hidden_states=self._unread(valid),
            encoder_attention_mask=valid.long(),
            use_cache=True,
            **{CACHE: cache},
        )
        hidden: Tensor = out.last_hidden_state
        return hidden

    def _crossing(
        self, live: Live, windows: Tensor, ids: Tensor, mask: Tensor
    ) -> tuple[EncoderDecoderCache, Tensor]:
        """A cache with the memories and what the encoder reads over them, for the decoder; and which of it counts."""
        made = self._read(live, windows, ids, mask)[self._encoder_layers :]
        cross = DynamicCache()
        for index, states in enumerate(made):
            cross.update(*self._behind(live, self._encoder_layers + index, states), index)
        return EncoderDecoderCache(DynamicCache(), cross), torch.cat([live.valid, mask], dim=1)

    def _unread(self, valid: Tensor) -> Tensor:
        """In place of states of the encoder, whose keys and values are in the cache: (B, K, d)."""
        width = self.model.get_input_embeddings().weight.shape[1]
        return torch.zeros(*valid.shape, width, dtype=self.model.dtype, device=valid.device)

    @staticmethod
    def _behind(live: Live, layer: int, states: States) -> States:
        if not live.cache.layers:
            return states
        held = live.cache.layers[layer]
        return torch.cat([held.keys, states[0]], dim=2), torch.cat([held.values, states[1]], dim=2)

    def _read(
        self,
        live: Live,
        windows: Tensor,
        ids: Tensor,
        mask: Tensor,
        comp: Tensor | None = None,
        gate: slice | None = None,
    ) -> list[States]:
        """Keys and values of left-padded text, then of embeddings, that the encoder reads over memories."""
        n, text = 0 if comp is None else comp.shape[-2], ids.shape[1]
        embeds = self.model.get_input_embeddings()(ids)
        place = (mask.long().cumsum(1) - 1).clamp(min=0) + windows.unsqueeze(1)
        if comp is not None:
            embeds = torch.cat([embeds, comp.to(embeds.dtype).expand(len(ids), -1, -1)], dim=1)
            mask = torch.cat([mask, mask.new_ones(len(ids), n)], dim=1)
            place = torch.cat([place, torch.arange(n, device=ids.device).expand(len(ids), -1)], dim=1)
        visible, distance = over(live, mask, text)
        return self._encoded(
            embeds, place, visible, distance, lambda layer, states: self._behind(live, layer, states), gate
        )

    def _encoded(
        self,
        embeds: Tensor,
        place: Tensor,
        visible: Tensor,
        distance: Tensor,
        front: Any,
        gate: Places | None,
    ) -> list[States]:
        """Keys and values of one pass of the encoder: of its layers, and of those in which the decoder reads it."""
        attention = [self.model.get_submodule(name) for name in self.family.attention]
        tables = distance_tables(attention, int(distance.abs().max()))
        plan = EncoderPlan(self.adapter, gate, visible, distance, tables, front, [])
        states = self.body(inputs_embeds=moved(self.body, embeds, place), **{PLAN: plan}).last_hidden_state
        start = torch.full((len(states), 1), start_token(self.model), device=states.device)
        out = self.model.get_decoder()(input_ids=start, encoder_hidden_states=states, use_cache=True)
        crossed = getattr(out, CACHE).cross_attention_cache.layers
        return [*plan.made, *((layer.keys, layer.values) for layer in crossed)]

    # ------------------------------------------------------------------ whole rows

    def forward(
        self,
        segments: Sequence[Sequence[Sequence[int]]],
        *,
        slots: int | None = None,
        sink: int | None = None,
        window: int | None = None,
        begin: int = 1,
    ) -> ParallelOutput:
        """One parallel pass over rows of segments, as of decoders; ``begin`` as for :meth:`logits`.

        Logits that there are none of are NaN, in the result, too.
        """
        layout = self.lay_out(segments, slots=slots, sink=sink, window=window)
        asked = [(r, j) for r, row in enumerate(segments) for j in range(len(row))]
        if short := [j for r, j in asked if not 1 <= begin <= len(segments[r][j])]:
            raise ConfigError(f"begin: got {begin}, and segment {short[0]} of a row is shorter")
        rows, numbers = torch.tensor(asked, device=self.model.device).unbind(1)
        read, words = (
            [segments[r][j][part] for r, j in asked] for part in (slice(begin), slice(begin, None))
        )
        made = self.head(self.written(*self.histories(layout, rows, numbers), read, words))
        out = made.new_full((*layout.input_ids.shape, made.shape[-1]), torch.nan)
        for k, (r, j) in enumerate(asked):
            start, stop = layout.spans[r][j]
            out[r, start + begin - 1 : stop] = made[k, : stop - start - begin + 1]
        return ParallelOutput(out, layout)

    def histories(self, layout: Layout, rows: Tensor, segments: Tensor) -> tuple[Live, Tensor]:
        """What some segments of rows see of all before them, by one pass of the encoder over the rows.

        Args:
            layout: of the rows.
            rows, segments: (N,) which.

        Returns:
            memories of N rows, with gradients, and (N,) raw tokens in each.
        """
        whole = Rows(layout, self.rule)
        columns, valid, windows = whole.before(rows, segments)
        cache = DynamicCache()
        if columns.shape[1]:
            embeds = self.model.get_input_embeddings()(layout.input_ids)
            comp = self.comp_embeddings.to(embeds.dtype)[layout.comp.clamp(min=0)]
            embeds = torch.where((layout.comp >= 0).unsqueeze(-1), comp, embeds)
            gate = (layout.comp >= 0).flatten().nonzero().squeeze(1)
            made = self._encoded(
                embeds, whole.raw_position(), whole.visible, whole.distance(), whole.columns, gate
            )
            for layer, states in enumerate(made):
                # (B, H, K, D) -> (N, H, m, D)
                cache.update(
                    *(
                        part[rows.unsqueeze(1), :, columns].transpose(1, 2)
                        for part in whole.columns(layer, states)
                    ),
                    layer,
                )
        position = (valid.long().cumsum(1) - 1).clamp(min=0)
        return Live(cache, position, torch.zeros_like(valid), valid), windows

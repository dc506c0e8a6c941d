"""Any scoring press of NVIDIA's kvpress (PyPI, Apache-2.0; arXiv 2510.00636) in the online loop.

A press scores the entries of one layer for one prompt. Here it is asked whenever text leaves the window, with the
entries [sink | slots and leaving | window] at their places and with the queries of the text that was read last. It
believes that these are hidden states of a layer without a projection. Presses that need more of a model than that are
refused: those with trained parts, with hidden states of all text, or with budgets of their own for every head.

kvpress 0.5 asks for an older transformers than this library, so pip cannot install both; `make kvpress-env` makes an
environment in which the two run together.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...core.memory import KV, Row
from ...core.reader import Reader
from ...core.rotary import rotate
from ...errors import ConfigError
from ..base import register
from ..scores import scoring
from .evict import Evict


@register("kvpress")
@dataclass(frozen=True, kw_only=True)
class KVPress(Evict):
    """A scoring press of NVIDIA's kvpress.

    Devoto et al., 2025, arXiv 2510.00636. It has an environment of its own (`make kvpress-env`).

    Attributes:
        press: its class, such as SnapKVPress.
        options: of that class, such as `options.window_size=16`.
    """

    queries: ClassVar[int] = -1
    package: ClassVar[str] = "kvpress"
    press: str = "SnapKVPress"
    options: dict[str, Any] = field(default_factory=dict)

    def _on(self, reader: Reader, tokenizer: Any) -> KVPress:
        bound = super()._on(reader, tokenizer)
        layers, heads, size = reader.kv_shape()
        if reader.rotary.stacked(torch.arange(1)).cos.shape[-1] != size:
            raise ConfigError(
                "method kvpress: its presses turn whole heads, and this model turns parts of them"
            )
        some = torch.randn(layers, heads, 16, size, generator=torch.Generator().manual_seed(0))
        some = some.to(reader.model.device)
        asked = some[:, :1, :8].expand(-1, reader.model.config.get_text_config().num_attention_heads, -1, -1)
        nothing = KV(some, some).slice(0, 0)
        bound.score(Row(nothing, nothing, nothing), KV(some, some), asked)
        return bound

    def score(self, row: Row, held: KV, queries: Tensor | None) -> Tensor:
        assert queries is not None  # the method asks for them
        if queries.shape[2] == 1:
            queries = queries.expand(-1, -1, 2, -1)  # a press looks at one and has another before it
        reader, start = self.reader, row.sink.length
        kv = KV.cat((row.sink.to(torch.float32), held, row.window.to(torch.float32)))
        first = kv.length - queries.shape[2]
        place = torch.arange(kv.length, device=kv.keys.device)
        keys = rotate(kv.keys, *reader.rotary.stacked(place))
        found = []
        for layer, how in enumerate(scoring(reader)):
            asked = queries[layer].float() * how.scaling * queries.shape[3] ** 0.5  # a press scales by d^-1/2

            def turned(_: Any, ids: Tensor, layer: int = layer) -> tuple[Tensor, Tensor]:
                tables = reader.rotary.stacked(ids[0] + first)  # it counts from the first query
                return tables.cos[layer], tables.sin[layer]

            module = SimpleNamespace(
                config=SimpleNamespace(num_attention_heads=len(asked), num_key_value_heads=keys.shape[1]),
                head_dim=keys.shape[3],
                layer_idx=layer,
                q_proj=nn.Identity(),
                rotary_emb=turned,
            )
            hidden = asked.transpose(0, 1).flatten(1)[None]  # (1, w, Hq D)
            kwargs = {"position_embeddings": turned(None, place[None, : asked.shape[1]])}
            try:
                score = self._press(hidden.shape[1]).score(
                    module, hidden, keys[layer][None], kv.values[layer][None], None, kwargs
                )
            except ConfigError:
                raise
            except Exception as error:  # whatever a press asks of a model that is none
                raise ConfigError(
                    f"method kvpress: {self.press} needs more than entries and queries "
                    f"({type(error).__name__}: {error}): take a scoring press, such as SnapKVPress"
                ) from error
            found.append(score[0])
        return torch.stack(found)[:, :, start : start + held.length].float()

    def _press(self, asked: int) -> Any:
        """The press, for so many queries; the sink is the row's own."""
        before = dict(ALL_ATTENTION_FUNCTIONS)
        try:
            presses = importlib.import_module("kvpress")
        except ImportError as error:
            raise ConfigError(
                f"method kvpress: the package kvpress cannot be imported ({error}): `make kvpress-env`"
            ) from error
        finally:
            ALL_ATTENTION_FUNCTIONS.update(before)  # its import wraps them all, for presses that mask heads
        if not isinstance(kind := getattr(presses, self.press, None), type) or not hasattr(kind, "score"):
            raise ConfigError(
                f"method kvpress: got press={self.press}, expected a class of kvpress that scores"
            )
        try:
            press = kind(**self.options)
        except TypeError as error:
            raise ConfigError(f"method kvpress: {self.press}: {error}") from error
        for option, most in (("n_sink", 0), ("window_size", max(1, asked - 1))):
            if hasattr(press, option):
                setattr(press, option, min(getattr(press, option), most))
        return press

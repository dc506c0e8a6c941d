"""The parallel pass of training without what an accelerator waits for: packed rows, few operations, few activations.

The same numbers as ``Compressor.hidden``, from the same weights, but written out for decoders of the common shape:

    x += Attention(Norm(x));  x += MLP(Norm(x))          each product W x + 1[x is COMP] B A x

COMP tokens are the last columns of a pass, so the adapter is two small products on a slice. Products that read the
same input (q, k, v; gate, up) are one, of the model as of the adapter. Frozen weights need no gradient: of a token
a layer keeps its two inputs, q, k, v, the output of the attention, and gate and up. Who sees whom comes as intervals
(``ccm.training.intervals``). On a CUDA device our kernels take them (``ccm.training.kernels``), or flex attention
where heads are of other sizes; elsewhere blocks of queries meet the keys that one of them sees.

A model of another shape is told by the numbers themselves: a trial pass must give what the model gives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import linear, pad
from torch.utils.checkpoint import checkpoint

from ..core.attention import additive
from ..core.blocks import attend as in_blocks
from ..core.blocks import cut, grouped
from ..core.compressor import Compressor
from ..core.rotary import Tables, rotate
from ..core.twin import text_config
from ..decoding.shape import LayerShape, Norm, Unfit
from .intervals import BLOCK, Packed

#: By how much of its size a trial pass may miss the model's; of half precision, as bfloat16.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}


def compiles(device: torch.device) -> bool:
    """Whether kernels can be compiled for a device: a CUDA device, and Triton."""
    return device.type == "cuda" and find_spec("triton") is not None


class _Conditional(torch.autograd.Function):
    """W x + b, and B A x on the last ``tail`` rows; W and b are frozen."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, tail: int
    ) -> Tensor:
        out = linear(x, weight, bias)
        ctx.tail = tail
        if tail:
            comp = x[-tail:].clone()  # a view would keep all of x
            low = linear(comp, down)
            out[-tail:].addmm_(low, up.T)
            ctx.save_for_backward(weight, down, up, comp, low)
        else:
            ctx.save_for_backward(weight)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, *rest = ctx.saved_tensors
        back = grad @ weight
        if not ctx.tail:
            return back, None, None, None, None, None
        down, up, comp, low = rest
        own = grad[-ctx.tail :]
        slope = own @ up
        back[-ctx.tail :].addmm_(slope, down)
        return back, None, None, slope.T @ comp, own.T @ low, None


@dataclass
class _Product:
    """Projections that read the same input, as one.

    Attributes:
        weight: (sum of d_out, d_in), of which the modules' own weights are views now.
        bias: (sum of d_out,) or None.
        sizes: d_out of each.
        adapter: the LoRA pairs (A, B) of each projection, None where it has none.
        scaling: of the LoRA.
    """

    weight: Tensor
    bias: Tensor | None
    sizes: list[int]
    adapter: list[tuple[nn.Parameter, nn.Parameter] | None]
    scaling: float

    @classmethod
    def of(cls, modules: Sequence[nn.Module], adapter: str) -> _Product:
        bases = [getattr(module, "base_layer", module) for module in modules]
        if any(type(base) is not nn.Linear for base in bases):
            raise Unfit(f"{type(bases[0]).__name__} is no plain linear layer")
        weight = torch.cat([base.weight for base in bases]) if len(bases) > 1 else bases[0].weight.detach()
        sizes = [base.out_features for base in bases]
        if len(bases) > 1:
            for base, part in zip(bases, weight.split(sizes), strict=True):
                base.weight.data = part
        biases = [base.bias for base in bases]
        bias = None
        if any(b is not None for b in biases):
            bias = torch.cat(
                [weight.new_zeros(n) if b is None else b for b, n in zip(biases, sizes, strict=True)]
            )
        pairs = [
            (module.lora_A[adapter].weight, module.lora_B[adapter].weight)
            if adapter in getattr(module, "lora_A", {})
            else None
            for module in modules
        ]
        scaling = next((module.scaling[adapter] for module, p in zip(modules, pairs, strict=True) if p), 0.0)
        return cls(weight.detach(), bias, sizes, pairs, scaling)


def _joined(products: Sequence[_Product], dtype: torch.dtype) -> list[tuple[Tensor, Tensor] | None]:
    """The adapters of products of one shape, all layers at once: of each (R, d_in), its A's one on the other, and
    (sum of d_out, R), its B's on a diagonal, with the scaling."""
    first = products[0]
    if not any(first.adapter):
        return [None] * len(products)
    downs, ups, start = [], [], 0
    ranks = sum(len(pair[0]) for pair in first.adapter if pair)
    for place, (pair, size) in enumerate(zip(first.adapter, first.sizes, strict=True)):
        if pair is None:
            ups.append(first.weight.new_zeros(len(products), size, ranks, dtype=torch.float32))
            continue
        own = [pair for product in products if (pair := product.adapter[place])]
        downs.append(torch.stack([a for a, _ in own]))
        up = torch.stack([b for _, b in own])
        ups.append(pad(up, (start, ranks - start - up.shape[2])))
        start += up.shape[2]
    down, up = torch.cat(downs, dim=1).to(dtype), (torch.cat(ups, dim=1) * first.scaling).to(dtype)
    return list(zip(down.unbind(), up.unbind(), strict=True))


@dataclass
class _Layer:
    """One decoder layer, as tensors."""

    before: Norm
    qkv: _Product
    query_norm: Norm | None
    key_norm: Norm | None
    out: _Product
    after: Norm | None  # of what attention gives, where a family has it
    middle: Norm
    gate_up: _Product
    act: Callable[[Tensor], Tensor]
    down: _Product
    end: Norm | None  # of what the MLP gives
    near: int | None
    kind: str | None
    scale: float

    @classmethod
    def of(cls, layer: Any, adapter: str, kind: str | None) -> _Layer:
        shape = LayerShape.of(layer)
        if len(shape.qkv) != 3 or len(shape.gate_up) != 2:
            raise Unfit("its layers are written in another way (projections are joined)")
        return cls(
            before=shape.before,
            qkv=_Product.of(shape.qkv, adapter),
            query_norm=shape.query_norm,
            key_norm=shape.key_norm,
            out=_Product.of([shape.out], adapter),
            after=shape.after,
            middle=shape.middle,
            gate_up=_Product.of(shape.gate_up, adapter),
            act=shape.act,
            down=_Product.of([shape.down], adapter),
            end=shape.end,
            near=shape.near,
            kind=kind,
            scale=shape.scale,
        )


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return rotate(x, cos, sin, interleaved)


def _gated(act: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return act(gate) * up


class LeanPass:
    """Passes of one compressor over packed rows.

    Args:
        compressor: on its device, with an adapter of kind "ccm".
        fuse: compile what goes element by element.
        save_memory: keep no activations inside layers.

    Raises:
        Unfit: the model has another shape.
    """

    def __init__(self, compressor: Compressor, fuse: bool = False, save_memory: bool = False):
        config = compressor.config
        if config.kind != "ccm":
            raise Unfit("the adapter is of another kind")
        self.compressor, self.save_memory = compressor, save_memory
        model = compressor.model
        body = model.get_submodule(compressor.family.body)
        self.dtype, self.device = model.dtype, model.device
        try:
            modules = [model.get_submodule(name.rsplit(".", 1)[0]) for name in compressor.family.attention]
            self.layers = [
                _Layer.of(layer, compressor.adapter, kind)
                for layer, kind in zip(modules, compressor.rotary.layer_types, strict=True)
            ]
            if (norm := Norm.of(body.norm)) is None:
                raise Unfit("it ends without a norm")
            self.norm = norm
        except (AttributeError, TypeError, RuntimeError) as error:
            raise Unfit(f"its layers are written in another way ({error})") from error
        settings = text_config(model.config)
        self.heads = settings.num_attention_heads
        self.size = int(getattr(settings, "head_dim", None) or settings.hidden_size // self.heads)
        self.shared = (sum(self.layers[0].qkv.sizes) // self.size - self.heads) // 2
        self.near = list(dict.fromkeys(layer.near for layer in self.layers))
        if len({(tuple(x.qkv.sizes), tuple(x.gate_up.sizes), x.kind is None) for x in self.layers}) > 1:
            raise Unfit("its layers have different sizes")
        self.turn: Callable[..., Tensor] = _turn
        self.gated: Callable[..., Tensor] = _gated
        if fuse:
            self._fuse()

    def _fuse(self) -> None:
        """One kernel each way for both: ours on a CUDA device, of the common kinds, else what is compiled."""
        self.turn, self.gated = torch.compile(_turn, dynamic=True), torch.compile(_gated, dynamic=True)
        if not compiles(self.device):
            return
        from . import fused

        at = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        tables = self.compressor.rotary.tables(at).values()
        if all(table.cos.shape[-1] == self.size and not table.interleaved for table in tables):
            self.turn = lambda x, cos, sin, interleaved: fused.turned(x, cos, sin)
        if all(isinstance(layer.act, nn.SiLU) for layer in self.layers):
            self.gated = lambda act, x: fused.gated(x)

    # ------------------------------------------------------------------ one pass

    def hidden(self, rows: Packed, adapter: Sequence[Any] | None = None) -> Tensor:
        """Hidden states (T, d) of the text after the last layer, before the last norm; rows are on the device."""
        embed = self.compressor.model.get_input_embeddings()
        x = embed(rows.ids)
        tail = len(rows.comp)
        if tail:
            comp = self.compressor.comp_embeddings.to(x.dtype)[rows.comp]
            x = torch.cat([x, comp])
        frames = _Frames.of(self, rows)
        weights = adapter or self.adapter()
        for layer, own in zip(self.layers, weights, strict=True):
            if self.save_memory and torch.is_grad_enabled():
                x = checkpoint(self._layer, layer, own, x, frames, tail, use_reentrant=False)
            else:
                x = self._layer(layer, own, x, frames, tail)
        return x[: len(rows.ids)]

    def adapter(self) -> list[Any]:
        """The adapter's products of each layer, for the passes of a step."""
        kinds = [
            [layer.qkv for layer in self.layers],
            [layer.out for layer in self.layers],
            [layer.gate_up for layer in self.layers],
            [layer.down for layer in self.layers],
        ]
        return list(zip(*(_joined(products, self.dtype) for products in kinds), strict=True))

    def _layer(self, layer: _Layer, adapter: Any, x: Tensor, frames: _Frames, tail: int) -> Tensor:
        qkv, out, gate_up, down = adapter
        a = self._attention(layer, _apply(layer.qkv, layer.before(x), qkv, tail), frames, tail)
        a = _apply(layer.out, a, out, tail)
        x = x + (layer.after(a) if layer.after else a)
        h = self.gated(layer.act, _apply(layer.gate_up, layer.middle(x), gate_up, tail))
        h = _apply(layer.down, h, down, tail)
        return x + (layer.end(h) if layer.end else h)

    def _attention(self, layer: _Layer, qkv: Tensor, frames: _Frames, tail: int) -> Tensor:
        """(N, (H + 2 Hkv) D) -> (N, H D)."""
        both, value = qkv.view(len(qkv), -1, self.size).split([self.heads + self.shared, self.shared], dim=1)
        if layer.query_norm and layer.key_norm:
            query, key = both.split([self.heads, self.shared], dim=1)
            both = torch.cat([layer.query_norm(query), layer.key_norm(key)], dim=1)
        turned, key = self.turn(both, *frames.own[layer.kind]).split([self.heads, self.shared], dim=1)
        if not tail:
            return frames.attend(layer, turned, key, value)
        raw = both[:, self.heads :]
        # sinks and slots: keys off their position, the states of the memory, and on to their places
        rows = frames.rows
        memory, contents = (
            torch.cat([x.index_select(0, rows.sinks), frames.states(x[-tail:])]) for x in (raw, value)
        )
        memory = self.turn(memory, *frames.slots[layer.kind])
        contents = torch.cat([contents, value])
        if rows.query_position is None:
            return frames.attend(layer, turned, torch.cat([memory, key]), contents)
        # Text and slots live in two frames: the query is held in both, each half meets the keys of its frame.
        query = self.turn(both[:, : self.heads], *frames.other[layer.kind])
        query = torch.cat([query, turned], dim=-1)
        key = torch.cat([pad(memory, (0, self.size)), pad(key, (self.size, 0))])
        return frames.attend(layer, query, key, contents)


def _apply(product: _Product, x: Tensor, adapter: tuple[Tensor, Tensor] | None, tail: int) -> Tensor:
    if adapter is None or not tail:
        return _Conditional.apply(x, product.weight, product.bias, None, None, 0)
    return _Conditional.apply(x, product.weight, product.bias, *adapter, tail)


@dataclass
class _Frames:
    """What all layers of a pass share: tables of angles, the states' weights, and masks."""

    rows: Packed
    own: dict[str | None, Tables]
    slots: dict[str | None, Tables]
    other: dict[str | None, Tables]
    weights: Tensor | None
    masks: dict[int | None, Any]

    @classmethod
    def of(cls, passes: LeanPass, rows: Packed) -> _Frames:
        rotary = passes.compressor.rotary

        def tables(positions: Tensor | None) -> dict[str | None, Tables]:
            if positions is None:
                return {}
            found = rotary.tables(positions)
            return {
                k: Tables(t.cos.unsqueeze(1), t.sin.unsqueeze(1), t.interleaved) for k, t in found.items()
            }

        weights = None
        if rows.states is not None:
            row, column, value = rows.states
            weights = torch.zeros(rows.blocks, rows.folds, device=passes.device)
            weights[row.long(), column.long()] = value.float()
        keys = next(iter(rows.spans.values())).shape[1]
        queries = len(rows.position)
        sizes = (passes.size, passes.size * (1 if rows.query_position is None else 2))
        make: Callable[..., Any] = _blocks
        if compiles(passes.device):
            from . import kernels

            make = _plan if kernels.fits(passes.dtype, *sizes) else _block_mask
        group = passes.heads // passes.shared
        masks = {near: make(spans, queries, keys, passes.dtype, group) for near, spans in rows.spans.items()}
        return cls(
            rows,
            tables(rows.position),
            tables(rows.slot_position) if len(rows.comp) else {},
            tables(rows.query_position),
            weights,
            masks,
        )

    def states(self, comp: Tensor) -> Tensor:
        """Of COMP keys or values (C, Hkv, D): of all states of the memory, one behind the other."""
        if self.weights is None:
            return comp
        rows = self.rows
        blocks = comp[: rows.folds * rows.slots].reshape(rows.folds, -1)
        made = (self.weights @ blocks.float()).to(comp.dtype).view(-1, *comp.shape[1:])
        width = len(rows.slot_position) - len(rows.sinks)
        return pad(made, (0, 0, 0, 0, 0, width - len(made)))

    def attend(self, layer: _Layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(N, H, D'), (M + N, Hkv, D'), (M + N, Hkv, D) -> (N, H D)."""
        mask = self.masks[layer.near]
        if not isinstance(mask, BlockMask | tuple):
            from .kernels import interval_attention

            return interval_attention(query, key, value, mask, layer.scale).flatten(1)
        query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
        if isinstance(mask, BlockMask):
            shared = query.shape[1] != key.shape[1]
            out = _flex(query, key, value, block_mask=mask, scale=layer.scale, enable_gqa=shared)
            return out[0].transpose(0, 1).flatten(1)
        full, blocks = mask
        if not blocks:
            out, _ = grouped(None, query, key, value, full, layer.scale)  # type: ignore[arg-type]
        else:
            out = in_blocks(grouped, None, query, key, value, blocks, scaling=layer.scale)  # type: ignore[arg-type]
        return out[0].flatten(1)


_compiled: dict[tuple[Any, ...], Callable[..., Any]] = {}


def _flex(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Flex attention, compiled for each kind of heads: numbers of keys and queries may differ from pass to pass."""
    kind = (query.shape[1], query.shape[-1], query.dtype, torch.is_grad_enabled())
    if kind not in _compiled:
        _compiled[kind] = torch.compile(flex_attention)
    out: Tensor = _compiled[kind](query, *args, **kwargs)
    return out


def visible(spans: Tensor, queries: int) -> Tensor:
    """The mask (Q, K) that intervals stand for."""
    q = torch.arange(queries, device=spans.device).unsqueeze(1)
    return ((q >= spans[0]) & (q < spans[1])) | ((q >= spans[2]) & (q < spans[3]))


def _blocks(spans: Tensor, queries: int, keys: int, dtype: torch.dtype, group: int) -> Any:
    full = additive(visible(spans, queries), dtype)[None, None]
    return full, cut(full, together=1)  # rows of all lengths are next to each other


def _plan(spans: Tensor, queries: int, keys: int, dtype: torch.dtype, group: int) -> Any:
    from .kernels import plan_of

    return plan_of(spans, queries, group)


def _block_mask(spans: Tensor, queries: int, keys: int, dtype: torch.dtype, group: int) -> BlockMask:
    a, b, c, d = (part.contiguous() for part in spans)

    def seen(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return ((q >= a[k]) & (q < b[k])) | ((q >= c[k]) & (q < d[k]))

    start = torch.arange(0, queries, BLOCK, device=spans.device)  # of every block of queries
    met = _meets(a, b, start) | _meets(c, d, start)  # (K, blocks)
    met = met.unflatten(0, (-1, BLOCK)).any(1).T.contiguous()  # flex takes the strides for granted
    count = met.sum(1, dtype=torch.int32)
    order = met.to(torch.int8).argsort(dim=1, descending=True, stable=True).to(torch.int32)
    return BlockMask.from_kv_blocks(
        count[None, None], order[None, None], BLOCK_SIZE=BLOCK, mask_mod=seen, seq_lengths=(queries, keys)
    )


def _meets(first: Tensor, stop: Tensor, start: Tensor) -> Tensor:
    first, stop = first.unsqueeze(1), stop.unsqueeze(1)
    return (first < start + BLOCK) & (stop > start) & (stop > first)

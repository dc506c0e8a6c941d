"""The one attention function that ``ccm`` registers with transformers, and how the plan of a pass gets there.

Without a plan it is the model's own backend, bit for bit. With one (``ccm.core.attention``) the plan acts first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention import PLAN, Asked, MaskedPlan, ParallelPlan, Plan, StatesDone
from .blocks import attend as in_blocks
from .blocks import grouped


def _wrap(
    backend: Callable[[nn.Module], Callable[..., Any]], on_cpu: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """An attention function that lets the plan of the pass, if any, act before the backend.

    ``on_cpu`` takes the place of the backend on a processor in training, and where queries are in two frames: torch
    has no fused attention for values of another size.
    """

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        ccm_plan: Plan | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        run = backend(module)
        if ccm_plan is None:
            return run(module, query, key, value, attention_mask, **kwargs)
        if ccm_plan.asked is not None:
            ccm_plan.asked[int(module.layer_idx)] = Asked(query, kwargs)
        if module.layer_idx == ccm_plan.stop_at:
            raise StatesDone
        ccm_plan = ccm_plan.on(query.device)
        kwargs.pop("position_bias", None)  # of encoders, by column; the mask of their plan has its own
        query, key, value, mask = ccm_plan.extend(
            module, query, key, value, attention_mask, kwargs.get("sliding_window")
        )
        trained = isinstance(ccm_plan, ParallelPlan) and torch.is_grad_enabled()
        wide = query.shape[-1] != value.shape[-1] and query.dtype == torch.float32
        if (
            on_cpu
            and (trained or (wide and isinstance(ccm_plan, MaskedPlan)))
            and query.is_cpu
            and not kwargs.get("dropout")
        ):
            run = on_cpu
        blocks = ccm_plan.blocks(mask)
        if not blocks:
            return run(module, query, key, value, mask, **kwargs)
        return in_blocks(run, module, query, key, value, blocks, **kwargs), None

    return attend


class _Carrier(tuple[Tensor, ...]):
    """Position embeddings, and a plan."""

    plan: Plan


def bridge(model: PreTrainedModel, attention: Sequence[str]) -> None:
    """Bring the plan to attention modules whose layers hand on nothing but what they know.

    It goes along with the position embeddings, which every layer hands on. So it travels with the pass, whatever
    thread that is on, and is there again when gradient checkpointing runs a layer once more.
    """
    if model.__dict__.get("_ccm_bridge"):
        return
    model.__dict__["_ccm_bridge"] = True

    def put(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if (plan := kwargs.get(PLAN)) is None:
            return None
        carrier = _Carrier(kwargs["position_embeddings"])
        carrier.plan = plan
        return args, {**kwargs, "position_embeddings": carrier}

    def take(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, PLAN: getattr(kwargs["position_embeddings"], "plan", None)}

    for name in attention:
        model.get_submodule(name.rsplit(".", 1)[0]).register_forward_pre_hook(put, with_kwargs=True)
        model.get_submodule(name).register_forward_pre_hook(take, with_kwargs=True)


def _own_eager(module: nn.Module) -> Callable[..., Any]:
    """The family's own eager attention, with its soft-capping."""
    return sys.modules[type(module).__module__].eager_attention_forward


def register() -> None:
    """Register both backends and their mask functions (without one, transformers drops causality)."""
    AttentionInterface.register("ccm_sdpa", _wrap(lambda module: ALL_ATTENTION_FUNCTIONS["sdpa"], grouped))
    AttentionInterface.register("ccm_eager", _wrap(_own_eager))
    AttentionMaskInterface.register("ccm_sdpa", sdpa_mask)
    AttentionMaskInterface.register("ccm_eager", eager_mask)


def carry(model: nn.Module) -> None:
    """Let a pass of the model find the plan that its cache carries: ``generate`` takes no argument for it."""
    if _bring_plan not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_bring_plan, with_kwargs=True)


def _bring_plan(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    # named "cache" since transformers 5.24
    cache: Any = kwargs.get("cache", kwargs.get("past_key_values"))
    if (plan := getattr(cache, PLAN, None)) is None:
        return None
    # for beams and returned sequences ``generate`` repeats the tokens, but not the cache
    if cache.layers and (repeat := len(kwargs["input_ids"]) // len(cache.layers[0].keys)) > 1:
        cache.batch_repeat_interleave(repeat)
    return args, {**kwargs, PLAN: plan}

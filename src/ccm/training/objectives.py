"""What the student learns from: the teacher's whole distribution, or the text itself.

Both losses go from hidden states straight to the loss, a few hundred tokens at a time, and keep the gradient
instead of the logits: over a vocabulary of 49,152 the logits of a row are far larger than the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: Tokens whose logits are made at once, and tokens whose logits fit into a processor's cache: seven times faster.
CHUNK, BLOCK = 128, 8
#: The first on an accelerator, which would wait for its host between smaller ones; there is no second.
CHUNK_THERE = 2048

#: (student logits, teacher logits, targets) -> (loss per token, d loss / d student logits), all fp32.
Objective = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def distill(student: Tensor, teacher: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Dense self-distillation: KL(teacher || student), (N, V) logits -> (N,), (N, V)."""
    log_p = teacher.log_softmax(-1)
    log_q = student.log_softmax(-1)
    p = log_p.exp()
    return (p * (log_p - log_q)).sum(-1), log_q.exp_() - p


def cross_entropy(student: Tensor, teacher: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The paper's objective: -log q(target), (N, V) logits -> (N,), (N, V)."""
    log_q = student.log_softmax(-1)
    loss = -log_q.gather(1, targets.unsqueeze(1)).squeeze(1)
    grad = log_q.exp_()
    grad.scatter_add_(1, targets.unsqueeze(1), torch.full_like(grad[:, :1], -1.0))
    return loss, grad


#: "target-ce" is "ce" over the last segment of each row only (``ccm.training.targets.only_last``).
OBJECTIVES: dict[str, Objective] = {"distill": distill, "ce": cross_entropy, "target-ce": cross_entropy}


class _FromHidden(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, student: Tensor, teacher: Tensor, targets: Tensor, head: Any, objective: Objective
    ) -> Tensor:
        total = student.new_zeros((), dtype=torch.float32)
        grad = torch.empty_like(student)
        chunk, block_size = (CHUNK, BLOCK) if student.is_cpu else (CHUNK_THERE, CHUNK_THERE)
        for start in range(0, len(student), chunk):
            part = slice(start, start + chunk)
            with torch.enable_grad():
                hidden = student[part].detach().requires_grad_(True)
                logits = head(hidden)
            with torch.no_grad():
                taught = head(teacher[part]) if objective is not cross_entropy else logits
                slope = torch.empty_like(logits)
                for k in range(0, len(slope), block_size):
                    block = slice(k, k + block_size)
                    loss, slope[block] = objective(
                        logits[block].detach().float(), taught[block].float(), targets[part][block]
                    )
                    total += loss.sum()
            grad[part] = torch.autograd.grad(logits, hidden, slope)[0]
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (grad,) = ctx.saved_tensors
        return grad * upstream, None, None, None, None


def summed_loss(student: Tensor, teacher: Tensor, targets: Tensor, head: Any, objective: Objective) -> Tensor:
    """Sum of an objective over tokens.

    Args:
        student, teacher: hidden states (N, d) at the same tokens; only the student gets a gradient.
        targets: (N,) next tokens.
        head: hidden states to logits.
        objective: one of :data:`OBJECTIVES`.
    """
    return _FromHidden.apply(student, teacher, targets, head, objective)

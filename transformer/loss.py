"""The loss of section 5.4: cross-entropy with label smoothing, without a copy of the logits in float32."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.common.checks import check_floating, check_probability, check_tensor, dtype_name

# Elements of the logits in work at a time: few enough for a CPU's cache, enough to occupy a GPU.
_AT_ONCE = {"cpu": 2**18}
_AT_ONCE_ELSEWHERE = 2**26


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0, ignore_index: int = -100) -> Tensor:
    """``torch.nn.functional.cross_entropy`` of token logits, averaged over the labels that are not ignored.

    The target gives the label 1 - ε + ε / V and each of the V - 1 others ε / V. Everything is computed in float32, of
    16-bit logits too: torch's kernel for the CPU adds up tokens in bfloat16, where beyond a few hundred the sum grows
    no more. Nothing of the logits' size is kept for backward but they themselves.

    Args:
        logits: (..., V), floating.
        labels: (...) int64, in [0, V) or ``ignore_index``.
        label_smoothing: ε, 0.1 in the paper.
        ignore_index: the label of tokens that count nothing, such as padding.

    Returns:
        A scalar, float32, or float64 of such logits; NaN where every label is ignored, as torch's.

    Raises:
        ValueError, TypeError: an argument is not as described; the message names it.

    Source: section 5.4 of "Attention Is All You Need" (Vaswani et al., 2017); Szegedy et al., "Rethinking the Inception
    Architecture for Computer Vision", 2016, section 7.
    """
    check_tensor("logits", logits)
    check_floating("logits", logits)
    check_tensor("labels", labels, device=logits.device)
    if labels.dtype != torch.int64:
        raise TypeError(f"labels: got {dtype_name(labels.dtype)}, expected int64")
    if logits.dim() == 0 or labels.shape != logits.shape[:-1]:
        expected = f"{tuple(logits.shape[:-1])}, that of logits without the vocabulary"
        raise ValueError(f"labels: got shape {tuple(labels.shape)}, expected {expected}")
    check_probability("label_smoothing", label_smoothing)
    logits, labels = logits.flatten(0, -2) if logits.dim() > 1 else logits[None], labels.flatten()
    if torch.compiler.is_compiling():  # which fuses what follows from the equation
        return _eager(logits, labels, label_smoothing, ignore_index)
    loss: Tensor = _CrossEntropy.apply(logits, labels, label_smoothing, ignore_index)[0]
    return loss


def _accumulated(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _eager(logits: Tensor, labels: Tensor, label_smoothing: float, ignore_index: int) -> Tensor:
    logits = _accumulated(logits)
    return F.cross_entropy(logits, labels, ignore_index=ignore_index, label_smoothing=label_smoothing)


class _CrossEntropy(torch.autograd.Function):
    """The loss in a few rows of logits at a time: they stay in cache, and no second (tokens, V) is kept."""

    @staticmethod
    def forward(logits: Tensor, labels: Tensor, smoothing: float, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
        keep = labels != ignore_index
        index = labels.where(keep, 0)[:, None]
        losses = torch.empty(index.shape, dtype=_accumulated(logits[:0]).dtype, device=logits.device)
        for x, at, loss in _rows(logits, index, losses):
            log_softmax = _accumulated(x).log_softmax(1)
            torch.mean(log_softmax, 1, keepdim=True, out=loss)
            loss.mul_(-smoothing).sub_(log_softmax.gather(1, at), alpha=1 - smoothing)
        count = keep.sum()
        return losses.where(keep[:, None], 0).sum() / count, index, (keep / count)[:, None]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        logits, labels, *ctx.options = inputs
        _, index, share = output
        ctx.mark_non_differentiable(index, share)
        ctx.save_for_backward(logits, labels, index, share)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Tensor, None, None, None]:
        logits, labels, index, share = ctx.saved_tensors
        if torch.is_grad_enabled():  # a derivative of the gradient is wanted: that of the equation
            loss = _eager(logits, labels, *ctx.options)
            return torch.autograd.grad(loss, logits, grad, create_graph=True)[0], None, None, None
        smoothing, _ = ctx.options
        grad_logits = torch.empty_like(logits)
        target = grad.new_full((), smoothing - 1)
        for x, at, weight, out in _rows(logits, index, share * grad, grad_logits):
            difference = _accumulated(x).softmax(1).sub_(smoothing / logits.size(1))
            torch.mul(difference.scatter_add_(1, at, target.expand_as(at)), weight, out=out)
        return grad_logits, None, None, None


def _rows(logits: Tensor, *others: Tensor) -> Any:
    count = max(1, _AT_ONCE.get(logits.device.type, _AT_ONCE_ELSEWHERE) // logits.size(1))
    return zip(*(x.split(count) for x in (logits, *others)), strict=True)

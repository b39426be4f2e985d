"""Fused linear layer: the public function.

    Linear(x) = x Wᵀ + b

Read on in ``reference.py`` (the equation, eager) and ``native_cpu.py`` and ``triton_launch.py`` (the kernels' calls).
"""

from __future__ import annotations

from torch import Tensor

from ..common import native
from ..common.autocast import autocast
from ..common.backend import Candidate, is_free_to, select
from ..common.cuda import ABSENT
from ..common.library import reshaped
from . import native_cpu, op, reference, torch_linear, triton_support
from .problem import canonical

CANDIDATES = {
    "cuda": ABSENT,
    "triton": Candidate(triton_support.refusals, triton_support.workspace, triton_support.notes),
    "cpu": Candidate(native_cpu.refusals, native_cpu.workspace, native_cpu.notes),
    "torch": Candidate(torch_linear.refusals),
    "reference": Candidate(lambda p, automatic: [], reference.workspace),
}


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    precision: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """``torch.nn.functional.linear``: ``input @ weightᵀ + bias``, for the projections around attention.

    Args:
        input: (..., in_features), float32, float16, bfloat16 or float64. Any strides; a last one other than 1 is
            copied.
        weight: (out_features, in_features), dtype of input.
        bias: (out_features,), dtype of input.
        precision: of float32 products, "ieee", "tf32" or "tf32x3"; None follows ``torch.set_float32_matmul_precision``.
        backend: "auto", or one of "cuda", "triton", "cpu", "torch", "reference", which then runs or raises.

    Returns:
        (..., out_features) in the dtype of input, contiguous. Differentiable in input, weight and bias.

    Raises:
        ValueError, TypeError: an argument is not as described; the message names it.
        BackendRefused: the backend asked for does not take this problem, or none does; with every reason.

    Source: the projections W of "Attention Is All You Need" (Vaswani et al., 2017), section 3.2.2.
    """
    if precision is None and is_free_to("cpu", backend):
        out = native.short_way("linear_plain_cpu", (input, weight, bias), weights=(weight,))
        if out is not None:
            return out
    input, weight, bias = autocast(input, weight, bias)
    problem = canonical(input, weight, bias, precision)
    chosen = select("linear", CANDIDATES, problem, backend)
    if chosen == "torch":
        out = torch_linear.linear(problem)
    elif chosen == "reference":
        out = reference.linear(*problem[:3])
    else:
        out = op.linear(problem, chosen)
    return out if input.dim() == 2 else reshaped(out, (*input.shape[:-1], weight.size(0)))

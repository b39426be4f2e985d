"""Fused feed-forward network: the public function.

    FFN(x) = max(0, x W₁ + b₁) W₂ + b₂                      Vaswani et al., "Attention Is All You Need", equation (2)

Read on in ``reference.py`` (the equation, eager), ``triton_forward.py`` and ``triton_backward.py`` (the kernels).
"""

from __future__ import annotations

from torch import Tensor

from ..common import native, philox
from ..common.activations import ACTIVATIONS, Function, name_of
from ..common.autocast import autocast
from ..common.backend import Candidate, is_free_to, select
from ..common.cuda import ABSENT
from ..common.library import reshaped
from . import native_cpu, op, reference, torch_feed_forward, triton_support
from .problem import FeedForwardProblem, canonical

CANDIDATES = {
    "cuda": ABSENT,
    "triton": Candidate(triton_support.refusals, triton_support.workspace, triton_support.notes),
    "cpu": Candidate(native_cpu.refusals, native_cpu.workspace, native_cpu.notes),
    "torch": Candidate(torch_feed_forward.refusals, torch_feed_forward.workspace),
    "reference": Candidate(lambda p, automatic: [], reference.workspace),
}


def feed_forward(
    input: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    bias1: Tensor | None = None,
    bias2: Tensor | None = None,
    *,
    activation: str | Function = "relu",
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    residual: Tensor | None = None,
    residual_dropout_p: float = 0.0,
    recompute: bool = False,
    precision: str | None = None,
    seed: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """``dropout(act(input @ weight1ᵀ + bias1)) @ weight2ᵀ + bias2``, forward and backward.

    With a gate the hidden features are ``act(input @ gate_weightᵀ + gate_bias) * (input @ weight1ᵀ + bias1)``. With a
    residual the result is ``residual + dropout(...)``, of a mask of its own.

    Args:
        input: (..., d_in), float32, float16, bfloat16 or float64. Any strides; a last one other than 1 is copied.
        weight1: (d_ff, d_in), dtype of input, as are all that follow.
        weight2: (d_out, d_ff).
        bias1: (d_ff,).
        bias2: (d_out,).
        activation: "relu", "gelu" (exact, by erf), "gelu_tanh", "silu" or "relu2" (ReLU squared); torch's own functions
            count as their names. Any other callable is computed by torch, of which every kernel says so.
        gate_weight: (d_ff, d_in); given, the network is gated.
        gate_bias: (d_ff,), with ``gate_weight`` only.
        dropout_p: probability of dropping a hidden feature, between activation and second product, rounded to 1/65536.
            Applied whenever positive.
        residual: (..., d_out), added to the result.
        residual_dropout_p: probability of dropping an element of the result before the residual is added.
        recompute: keep only the inputs for backward, which computes the hidden features again. Otherwise one tensor
            of (tokens, d_ff) is kept, with a gate two. The reference keeps what eager torch keeps.
        precision: of float32 products, "ieee", "tf32" or "tf32x3"; None follows ``torch.set_float32_matmul_precision``.
        seed: int64 (2,), fixes both dropout masks on every kernel backend; drawn from torch's generator if None.
        backend: "auto", or one of "cuda", "triton", "cpu", "torch", "reference", which then runs or raises.

    Returns:
        (..., d_out) in the dtype of input, contiguous. Differentiable in all tensors but the seed. Under autocast every
        tensor, the residual too, is taken in its dtype.

    Raises:
        ValueError, TypeError: an argument is not as described; the message names it.
        BackendRefused: the backend asked for does not take this problem, or none does; with every reason.

    Source: equation (2) of "Attention Is All You Need" (Vaswani et al., 2017), dropout as in its section 5.4 and in
    ``torch.nn.TransformerEncoderLayer``; gates: Shazeer, "GLU Variants Improve Transformer", 2020, equation (6); GELU:
    Hendrycks and Gimpel, 2016; ReLU squared: So et al., "Primer", 2021.
    """
    known = name_of(activation)
    drops = not (type(dropout_p) is type(residual_dropout_p) is float and dropout_p == residual_dropout_p == 0.0)
    if known is not None and not drops and precision is None and seed is None and is_free_to("cpu", backend):
        tensors = (input, weight1, weight2, bias1, bias2, gate_weight, gate_bias, residual)
        weights = (weight1, weight2, gate_weight)
        plain = native.short_way("feed_forward_plain_cpu", tensors, ACTIVATIONS[known].number, weights=weights)
        if plain is not None:
            return plain
    input, weight1, weight2, bias1, bias2, gate_weight, gate_bias, residual = autocast(
        input, weight1, weight2, bias1, bias2, gate_weight, gate_bias, residual
    )
    problem = canonical(
        input,
        weight1,
        weight2,
        bias1,
        bias2,
        activation,
        gate_weight,
        gate_bias,
        dropout_p,
        residual,
        residual_dropout_p,
        recompute,
        precision,
        seed,
    )
    out = _run(select("feed_forward", CANDIDATES, problem, backend), problem)
    return out if input.dim() == 2 else reshaped(out, (*input.shape[:-1], weight2.size(0)))


def _run(backend: str, problem: FeedForwardProblem) -> Tensor:
    if backend == "torch":
        return torch_feed_forward.feed_forward(problem)
    if problem.drops and problem.seed is None:
        problem = problem._replace(seed=philox.draw_seed(problem.input.device))
    if backend == "reference":
        return reference.feed_forward(*problem[:12])
    return op.feed_forward(problem, backend)

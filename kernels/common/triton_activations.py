"""The activations and their derivatives inside Triton kernels, by the names of ``activations.py``; tiles of float32.

A constant stands right of a tensor: the interpreter takes no constexpr on the left of one.
"""

import triton
import triton.language as tl

SQRT_HALF = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
GELU_TANH_INNER = tl.constexpr(1.5957691216057308)  # 2 √(2/π): the tanh form is x σ(2 √(2/π) (x + 0.044715 x³))
GELU_TANH_CUBE = tl.constexpr(0.044715)


@triton.jit
def sigmoid(x):
    """σ(x) = 1 / (1 + exp(-x)) and 1 - σ(x), each to its own last places, where a subtraction would cancel."""
    e = tl.exp(-tl.abs(x))
    larger = 1.0 / (1.0 + e)
    smaller = e * larger
    return tl.where(x < 0.0, smaller, larger), tl.where(x < 0.0, larger, smaller)


@triton.jit
def gelu_tanh_square(z):
    """z², not beyond where the derivative is 0 or 1 in any case: so it overflows nowhere."""
    return tl.minimum(z * z, 1e4, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """act(z). Written so that a NaN stays one."""
    if ACTIVATION == "relu":
        value = tl.where(z <= 0.0, 0.0, z)
    elif ACTIVATION == "gelu":
        value = 0.5 * z * (1.0 + tl.erf(z * SQRT_HALF))
    elif ACTIVATION == "gelu_tanh":
        share, _ = sigmoid(z * (gelu_tanh_square(z) * GELU_TANH_CUBE + 1.0) * GELU_TANH_INNER)
        value = z * share
    elif ACTIVATION == "silu":
        share, _ = sigmoid(z)
        value = z * share
    else:
        tl.static_assert(ACTIVATION == "relu2")
        value = tl.where(z <= 0.0, 0.0, z * z)
    return value


@triton.jit
def activation_derivative(z, ACTIVATION: tl.constexpr):
    """act'(z), 0 at the kink as in torch."""
    if ACTIVATION == "relu":
        value = tl.where(z <= 0.0, 0.0, 1.0)
    elif ACTIVATION == "gelu":
        value = 0.5 * (1.0 + tl.erf(z * SQRT_HALF)) + z * INV_SQRT_2PI * tl.exp(-0.5 * z * z)
    elif ACTIVATION == "gelu_tanh":
        square = gelu_tanh_square(z)
        share, rest = sigmoid(z * (square * GELU_TANH_CUBE + 1.0) * GELU_TANH_INNER)
        value = share + z * (share * rest) * (square * 3.0 * GELU_TANH_CUBE + 1.0) * GELU_TANH_INNER
    elif ACTIVATION == "silu":
        share, rest = sigmoid(z)
        value = share * (z * rest + 1.0)
    else:
        tl.static_assert(ACTIVATION == "relu2")
        value = tl.where(z <= 0.0, 0.0, 2.0 * z)
    return value

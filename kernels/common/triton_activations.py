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
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """act(z). Written so that a NaN stays one."""
    if ACTIVATION == "relu":
        value = tl.where(z <= 0.0, 0.0, z)
    elif ACTIVATION == "gelu":
        value = 0.5 * z * (1.0 + tl.erf(z * SQRT_HALF))
    elif ACTIVATION == "gelu_tanh":
        value = z * sigmoid((z + z * z * z * GELU_TANH_CUBE) * GELU_TANH_INNER)
    elif ACTIVATION == "silu":
        value = z * sigmoid(z)
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
        s = sigmoid((z + z * z * z * GELU_TANH_CUBE) * GELU_TANH_INNER)
        value = s + z * s * (1.0 - s) * (1.0 + z * z * 3.0 * GELU_TANH_CUBE) * GELU_TANH_INNER
    elif ACTIVATION == "silu":
        s = sigmoid(z)
        value = s * (1.0 + z * (1.0 - s))
    else:
        tl.static_assert(ACTIVATION == "relu2")
        value = tl.where(z <= 0.0, 0.0, 2.0 * z)
    return value

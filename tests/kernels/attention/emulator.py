"""The CUDA kernels as the emulator of ``csrc/cuda/emulator`` runs them on the host: what they are called with."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from typing import Any

import torch
from torch import Tensor

from fusedformer.kernels.attention.problem import AttentionProblem, canonical
from fusedformer.kernels.common import cuda
from tests.cases import GUARD

DTYPES = [torch.float16, torch.bfloat16]

Forward = Callable[[AttentionProblem], tuple[Tensor, Tensor, Tensor]]


class Tensor4(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("strides", c_int64 * 3)]

    @classmethod
    def of(cls, x: Tensor) -> Tensor4:
        return cls(x.data_ptr(), (c_int64 * 3)(*x.stride()[:3]))


class ProblemStruct(ctypes.Structure):
    """``AttentionProblem`` of ``csrc/cuda/problem.h``."""

    _fields_ = [
        *((name, Tensor4) for name in ("q", "k", "v", "out")),
        *((name, c_void_p) for name in ("lse", "lse_residual")),
        *((name, c_int) for name in ("batch", "heads", "heads_kv", "len_q", "len_k", "head_dim", "value_dim")),
        ("bf16", c_bool),
        ("scale", c_float),
        *((name, c_int64) for name in ("position_offset", "window_left", "window_right")),
    ]


class GradientsStruct(ctypes.Structure):
    """``AttentionGradients`` of ``csrc/cuda/problem.h``."""

    _fields_ = [
        *((name, Tensor4) for name in ("grad_out", "grad_q", "grad_k", "grad_v")),
        ("grad_lse", c_void_p),
        ("workspace", c_void_p),
    ]


def load() -> ctypes.CDLL:
    """The emulated kernels, to be called past torch's dispatcher, and what checks the emulator itself."""
    library = ctypes.CDLL(str(cuda.EMULATED.path))
    problem, gradients = POINTER(ProblemStruct), POINTER(GradientsStruct)
    library.check_attention_forward.argtypes = [problem]
    library.check_attention_backward.argtypes = [problem, gradients]
    library.check_attention_backward_workspace.argtypes = [problem]
    library.check_product.argtypes = [c_void_p, c_void_p, c_void_p, c_int, c_int, c_int, c_bool, c_bool]
    library.check_mistake.argtypes = [c_void_p, c_void_p, c_int]
    for name in ("check_attention_forward", "check_attention_backward", "check_product", "check_mistake"):
        getattr(library, name).restype = c_char_p
    library.check_attention_backward_workspace.restype = c_size_t
    return library


def message(error: bytes | None) -> str:
    return "" if error is None else error.decode()


def problem_struct(p: AttentionProblem, out: Tensor, lse: Tensor, lse_residual: Tensor) -> ProblemStruct:
    tensors = map(Tensor4.of, (p.query, p.key, p.value, out))
    sizes = (*p.query.shape[:2], p.key.size(1), p.query.size(2), *p.key.shape[2:], p.value.size(3))
    band = (p.position_offset, p.window_left, p.window_right)
    bf16 = p.query.dtype == torch.bfloat16
    return ProblemStruct(*tensors, lse.data_ptr(), lse_residual.data_ptr(), *sizes, bf16, p.scale, *band)


def guarded(*tensors: Tensor) -> list[tuple[Tensor, Tensor]]:
    """For each, a buffer of NaN and a tensor in the middle of it, laid out the same."""
    pairs = []
    for x in tensors:
        buffer = x.new_full((x.numel() + 2 * GUARD,), float("nan"))
        pairs.append((buffer, buffer[GUARD:-GUARD].as_strided(x.shape, x.stride(), GUARD)))
    return pairs


def problem_of(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> AttentionProblem:
    given: dict[str, Any] = {
        "scale": None,
        "is_causal": False,
        "causal_alignment": "top_left",
        "window": None,
        "enable_gqa": False,
    }
    given |= options
    return canonical(
        query,
        key,
        value,
        attn_mask=None,
        dropout_p=0.0,
        key_mask=None,
        softcap=None,
        alibi_slopes=None,
        sinks=None,
        precision=None,
        seed=None,
        return_lse=True,
        **given,
    )

"""What the public functions accept and refuse, which backend takes which problem, and what ``explain`` says of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fusedformer import BackendRefused, explain
from fusedformer import functional as F
from fusedformer.functional import dropout_add_layer_norm, dropout_add_rms_norm
from fusedformer.kernels.common import native
from fusedformer.kernels.common.backend import record_decisions
from fusedformer.kernels.norm.config import pick_config, sums_in_rows
from fusedformer.kernels.norm.problem import chunk_rows
from tests.lanes import built, interpreted

BUILT = native.EXTENSION.path is not None
X, VECTOR = torch.randn(2, 3, 8), torch.randn(8)

BAD: list[tuple[str, dict[str, Any]]] = [
    ("input: got list, expected a Tensor", {"input": [1.0]}),
    (r"input: got int32, expected one of", {"input": torch.zeros(2, 8, dtype=torch.int32)}),
    (r"input: got shape \(\), expected \(..., d\)", {"input": torch.tensor(1.0)}),
    (r"input: got shape \(2, 0\), expected \(..., d\) with d of at least 1", {"input": torch.zeros(2, 0)}),
    ("input: got a nested or sparse tensor", {"input": X[0].to_sparse()}),
    ("residual: got float, expected a Tensor", {"residual": 1.0}),
    (r"residual: got shape \(8,\), expected that of input, \(2, 3, 8\)", {"residual": VECTOR}),
    ("residual: got int64", {"residual": torch.zeros(2, 3, 8, dtype=torch.int64)}),
    ("residual: got a tensor on meta, expected cpu", {"residual": X.to("meta")}),
    (r"weight: got shape \(7,\), expected \(d,\) = \(8,\)", {"weight": torch.ones(7)}),
    (r"weight: got shape \(1, 8\)", {"weight": torch.ones(1, 8)}),
    ("weight: got bfloat16, expected float32", {"weight": VECTOR.bfloat16()}),
    ("weight: got float16, expected bfloat16 or float32",
     {"input": X.bfloat16(), "residual": None, "weight": VECTOR.half()}),
    ("weight: got float32, expected float64", {"input": X.double(), "residual": None}),
    ("weight: got str, expected a Tensor", {"weight": "ones"}),
    (r"bias: got shape \(8, 1\)", {"bias": torch.ones(8, 1)}),
    ("bias: got float32, expected bfloat16, weight's",
     {"input": X.bfloat16(), "residual": None, "weight": VECTOR.bfloat16()}),
    (r"dropout_p: got 1.5, expected a probability in \[0, 1\]", {"dropout_p": 1.5}),
    ("dropout_p: got nan", {"dropout_p": float("nan")}),
    ("dropout_p: got str, expected a number", {"dropout_p": "0.1"}),
    ("eps: got -1.0, expected a number of at least 0", {"eps": -1.0}),
    ("eps: got nan", {"eps": float("nan")}),
    ("eps: got NoneType, expected a number", {"eps": None}),
    ("seed: got int, expected a Tensor", {"seed": 3, "dropout_p": 0.1}),
    (r"seed: got int32 of shape \(2,\)", {"seed": torch.zeros(2, dtype=torch.int32)}),
    (r"seed: got int64 of shape \(3,\)", {"seed": torch.zeros(3, dtype=torch.int64)}),
    ("backend: got 'gpu', expected one of", {"backend": "gpu"}),
]  # fmt: skip


@pytest.mark.parametrize(("message", "bad"), BAD, ids=[f"{number}-{said[:12]}" for number, (said, _) in enumerate(BAD)])
def test_mistakes_are_named(message: str, bad: dict[str, Any]) -> None:
    good: dict[str, Any] = {"input": X, "residual": X, "weight": VECTOR, "bias": VECTOR}
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        dropout_add_layer_norm(**good | bad)
    if "bias" not in bad and not message.startswith("bias"):
        del good["bias"]
        with pytest.raises((TypeError, ValueError), match=f"^{message}"):
            dropout_add_rms_norm(**good | bad)


def test_they_are_functions_of_the_drop_in() -> None:
    assert F.dropout_add_layer_norm is dropout_add_layer_norm
    assert {"dropout_add_layer_norm", "dropout_add_rms_norm"} <= set(F.__all__)


def test_plain_calls_are_torchs_own_norms() -> None:
    out = dropout_add_layer_norm(X, None, VECTOR, VECTOR)
    torch.testing.assert_close(out, torch.nn.functional.layer_norm(X, (8,), VECTOR, VECTOR))
    out = dropout_add_rms_norm(X, X, VECTOR)
    torch.testing.assert_close(out, torch.nn.functional.rms_norm(X + X, (8,), VECTOR, 1e-6))


def test_dtypes_of_results() -> None:
    """The wider one of input and residual; parameters change nothing."""
    half, brain = X.half(), X.bfloat16()
    for input, residual, dtype in (
        (brain, None, torch.bfloat16), (brain, brain, torch.bfloat16), (brain, X, torch.float32),
        (X, brain, torch.float32), (brain, half, torch.float32), (half, X.double(), torch.float64),
        (X.double(), half, torch.float64),
    ):  # fmt: skip
        backend = "reference" if dtype == torch.float64 else "auto"
        weight = VECTOR.to(dtype) if dtype == torch.float64 else VECTOR
        leaf = input.clone().requires_grad_()
        out, total = dropout_add_rms_norm(leaf, residual, weight, return_sum=True, backend=backend)
        assert (out.dtype, total.dtype) == (dtype, dtype)
        (grad,) = torch.autograd.grad(out.sum(), leaf)
        assert grad.dtype == input.dtype
        wide = dropout_add_rms_norm(input.double(), None if residual is None else residual.double(), weight.double())
        torch.testing.assert_close(out.double(), wide, rtol=2e-2, atol=2e-2)


def decide(function: Any, *arguments: Any, **options: Any) -> Any:
    with record_decisions() as explanation:
        function(*arguments, **options)
    (decision,) = explanation.decisions
    return decision


def test_auto_decides_and_says_why() -> None:
    decision = decide(dropout_add_layer_norm, X, X, VECTOR, VECTOR)
    assert decision.operation == "dropout_add_layer_norm"
    assert decision.chosen == ("cpu" if BUILT else "torch")
    assert "input (2, 3, 8) float32, cpu, residual float32, weight float32, bias float32" in str(decision)
    seed = torch.zeros(2, dtype=torch.int64)
    decision = decide(dropout_add_rms_norm, X, None, None, dropout_p=0.1, seed=seed)
    assert decision.operation == "dropout_add_rms_norm"
    assert decision.refusals["torch"] == ["torch draws its own dropout mask, a seed was given"]
    decision = decide(dropout_add_rms_norm, X.double(), None, None)
    assert decision.chosen == "reference"
    assert decision.refusals["torch"] == ["float64 is left to the reference"]
    if BUILT:
        assert decision.refusals["cpu"] == ["kernels are for float32, float16 and bfloat16, not float64"]
        assert explain(dropout_add_rms_norm, X, None, None).decisions[0].notes == [
            f"instruction set level {native.level()}"
        ]


@pytest.mark.parametrize("backend", ["cuda", "triton", "cpu", "torch"])
def test_explicit_means_explicit(backend: str) -> None:
    seed = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(BackendRefused, match=rf'backend="{backend}" refuses dropout_add_layer_norm\(input'):
        dropout_add_layer_norm(X.double(), None, None, None, dropout_p=0.1, seed=seed, backend=backend)


@interpreted
def test_triton_says_how_long_a_row_may_be() -> None:
    with pytest.raises(BackendRefused, match="triton: rows of up to 16384 features, got 16385"):
        dropout_add_rms_norm(torch.randn(1, 16385), None, None, backend="triton")


@built
def test_workspace_is_what_is_kept_and_the_partial_sums() -> None:
    x = torch.randn(256, 64, dtype=torch.bfloat16)
    assert decide(dropout_add_layer_norm, x, x, None, None).workspace_bytes == 0
    leaf, weight = x.clone().requires_grad_(), torch.ones(64, requires_grad=True)
    kept = 256 * 64 * 2 + 256 * 2 * 4
    partial = 4 * (256 // 32) * 64
    assert decide(dropout_add_layer_norm, leaf, x, weight, None).workspace_bytes == kept + partial
    assert decide(dropout_add_rms_norm, leaf, None, weight).workspace_bytes == 256 * 4 + partial


def test_what_is_kept_for_backward() -> None:
    """Sum and statistics, and neither inputs nor mask."""
    kept: list[Tensor] = []
    input, residual = (torch.randn(50, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))

    def pack(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        dropout_add_layer_norm(input, residual, None, None, dropout_p=0.1, backend="cpu" if BUILT else "auto")
    if BUILT:
        assert sum(x.numel() * x.element_size() for x in kept) == 50 * 64 * 2 + 2 * 50 * 4 + 16


@pytest.mark.parametrize("rows", [0, 1, 31, 32, 33, 4096, 4097, 10**6])
def test_chunks_hold_all_rows(rows: int) -> None:
    chunk = chunk_rows(rows, 128)
    assert chunk >= 32
    assert -(-rows // chunk) <= 128


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "gfx942", "interpreter"])
def test_every_row_has_a_tile(architecture: str) -> None:
    for features in (1, 8, 40, 512, 1000, 1025, 4096, 5000, 16384):
        for kernel in ("forward", "backward"):
            tile = pick_config(kernel, features, architecture)
            assert features <= tile.block_n <= max(16, 2 * features)
        assert pick_config("backward_parameters", features, architecture).block_n <= 128
        if sums_in_rows(features, architecture):
            assert pick_config("backward_with_parameters", features, architecture).block_n >= features
    with pytest.raises(ValueError, match="no tile for forward, 16385 features"):
        pick_config("forward", 16385, architecture)

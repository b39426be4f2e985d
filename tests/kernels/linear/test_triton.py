"""What is the Triton kernels' own, interpreted: tiles of every kind, and torch's products in their place."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fusedformer import explain
from fusedformer.functional import linear
from fusedformer.kernels.common.device import TRITON_INSTALLED
from fusedformer.kernels.common.gemm_tiles import LIBRARY, GemmTile
from fusedformer.kernels.linear import triton_support
from fusedformer.kernels.linear.problem import LinearProblem
from tests.lanes import interpreted
from tests.tolerances import assert_equal_bits, assert_within_contract

if TRITON_INSTALLED:
    from fusedformer.kernels.common.triton_launch import Launch
    from fusedformer.kernels.linear import triton_launch

pytestmark = interpreted

GUARD = 64
PLAIN = GemmTile(block_m=32, block_n=32, block_k=32, num_warps=4, num_stages=1, group_m=2)
TILES = {
    "plain": PLAIN,
    "parts": replace(PLAIN, parts=2),
    "column after column": replace(PLAIN, group_m=64),
    "every step a slice": replace(PLAIN, fill=1000),
    "wider than high": replace(PLAIN, block_m=16, block_n=64),
    "descriptors": replace(PLAIN, tma=True, fill=13),
    "library": replace(PLAIN, gemm=LIBRARY),
}
# Rows, in_features, out_features.
SHAPES = [(1, 8, 13), (17, 33, 7), (65, 72, 40), (129, 24, 56), (3, 1, 1)]


@pytest.fixture
def use_tile(monkeypatch: pytest.MonkeyPatch) -> Any:
    def use(tile: GemmTile) -> None:
        for module in (triton_launch, triton_support):
            monkeypatch.setattr(module, "pick_tile", lambda kernel, problem, arch=None: tile)

    return use


def guarded(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Random numbers, NaN to the right of every row and around them all."""
    wide = torch.full((shape[0] + 2, shape[1] + GUARD), float("nan"), dtype=dtype)
    return wide[1:-1, : shape[1]].copy_(torch.randn(shape) * scale)


def make_inputs(rows: int, in_features: int, out_features: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Input, weight, bias and the gradient to send back."""
    bias = torch.randn(out_features).to(dtype)
    weight = guarded(out_features, in_features, dtype=dtype, scale=in_features**-0.5)
    return guarded(rows, in_features, dtype=dtype), weight, bias, guarded(rows, out_features, dtype=dtype)


def results(function: Any, *inputs: Tensor, **given: Any) -> dict[str, Tensor]:
    *tensors, grad_out = inputs
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = function(*leaves, **given)
    names = ("grad input", "grad weight", "grad bias")
    return {"out": out.detach()} | dict(zip(names, torch.autograd.grad(out, leaves, grad_out), strict=False))


def assert_within(actual: dict[str, Tensor], inputs: tuple[Tensor, ...]) -> None:
    truth = results(F.linear, *(x.double() for x in inputs))
    eager = results(F.linear, *inputs)
    # Products summed in another order: those of the dimensions turned around.
    turned = results(lambda x, w, b=None: F.linear(x.flip(1), w.flip(1), b), *inputs)
    assert actual.keys() == truth.keys()
    for name, x in actual.items():
        assert_within_contract(x, truth[name], [eager[name], turned[name]], name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tile", TILES)
def test_every_kind_of_tile_holds_the_contract(
    tile: str, shape: tuple[int, int, int], dtype: torch.dtype, use_tile: Any, launched: list[Any], seed: int
) -> None:
    launched.clear()  # the test may run on several draws
    use_tile(TILES[tile])
    inputs = make_inputs(*shape, dtype)
    actual = results(linear, *inputs, backend="triton")
    assert_within(actual, inputs)
    again = results(linear, *inputs, backend="triton")
    for name, x in actual.items():
        assert_equal_bits(again[name], x, name)
    is_aligned = all(x.stride(0) * x.element_size() % 16 == 0 for x in (inputs[0], inputs[1], inputs[3]))
    asked = [step.arguments["USE_TMA"] for step in launched if isinstance(step, Launch) and "USE_TMA" in step.arguments]
    assert len(asked) == (0 if tile == "library" else 6)
    assert all(asked) == (tile == "library" or (tile == "descriptors" and is_aligned))


@pytest.mark.parametrize("rows", [1, 17, 65])
def test_without_bias(rows: int, seed: int) -> None:
    x, weight, _, grad_out = make_inputs(rows, 40, 24, torch.float32)
    assert_within(results(linear, x, weight, grad_out, backend="triton"), (x, weight, grad_out))


def test_no_rows_are_gradients_of_zero(use_tile: Any) -> None:
    for tile in (PLAIN, TILES["descriptors"], TILES["library"]):
        use_tile(tile)
        problem = LinearProblem(torch.zeros(0, 8), torch.ones(5, 8), torch.ones(5), "torch")
        out = triton_launch.forward(problem)
        assert out.shape == (0, 5)
        grad_input, grad_weight, grad_bias = triton_launch.backward(out, problem, [True] * 3)
        assert grad_input is not None
        assert grad_input.shape == (0, 8)
        for grad, like in ((grad_weight, problem.weight), (grad_bias, problem.bias)):
            assert grad is not None
            assert like is not None
            assert_equal_bits(grad, torch.zeros_like(like))


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_gradients_only_where_they_are_asked_for(wanted: int, launched: list[Any], seed: int) -> None:
    x, weight, bias, grad_out = make_inputs(17, 40, 24, torch.float32)
    problem = LinearProblem(x, weight, bias, "torch")
    everything = triton_launch.backward(grad_out, problem, [True] * 3)
    launched.clear()
    grads = triton_launch.backward(grad_out, problem, [place == wanted for place in range(3)])
    for place, (grad, expected) in enumerate(zip(grads, everything, strict=True)):
        if place != wanted:
            assert grad is None
            continue
        assert grad is not None
        assert expected is not None
        assert_equal_bits(grad, expected)
    kernels = (["linear_backward_input"], ["linear_backward_weight"], ["column_sums", "sum_slices"])[wanted]
    assert [step.kernel.fn.__name__ for step in launched][: len(kernels)] == [f"{name}_kernel" for name in kernels]


def test_precision_of_one_call_is_not_torchs(use_tile: Any, launched: list[Any], seed: int) -> None:
    use_tile(TILES["library"])
    inputs = make_inputs(17, 40, 24, torch.float32)
    assert_within(results(linear, *inputs, precision="ieee", backend="triton"), inputs)
    assert all(isinstance(step, Launch) for step in launched)


def test_explain_says_what_a_library_computes(use_tile: Any) -> None:
    x, weight = torch.ones(3, 8), torch.ones(16, 8)
    (before,) = explain(linear, x, weight, backend="triton").decisions
    use_tile(TILES["library"])
    (after,) = explain(linear, x, weight, backend="triton").decisions
    assert before.notes == ["not verified on this architecture (interpreter)"]
    named = "forward, backward_input, backward_weight"
    assert after.notes == [*before.notes, f"products by torch's library, the rest by our kernels: {named}"]

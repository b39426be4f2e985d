"""What is the Triton kernels' own, interpreted: tiles of every kind, dropout's bits, torch's products in their place.

The contract on the tiles of ``tuned/interpreter.json`` is ``test_contract.py``'s.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedformer import explain
from fusedformer.functional import feed_forward
from fusedformer.kernels.common import philox
from fusedformer.kernels.common.device import TRITON_INSTALLED
from fusedformer.kernels.common.gemm_tiles import LIBRARY, GemmTile
from fusedformer.kernels.feed_forward import triton_support
from fusedformer.kernels.feed_forward.problem import FeedForwardProblem
from tests.kernels.feed_forward.cases import Case, make_inputs
from tests.kernels.feed_forward.eager import assert_results_within_contract, fused, results
from tests.lanes import interpreted
from tests.tolerances import assert_equal_bits

if TRITON_INSTALLED:
    from fusedformer.kernels.common.triton_launch import Launch, LibraryProduct
    from fusedformer.kernels.feed_forward import triton_launch

pytestmark = interpreted

PLAIN = GemmTile(block_m=32, block_n=32, block_k=32, num_warps=4, num_stages=1, group_m=2)
TILES = {
    "parts": replace(PLAIN, parts=2),
    "one row of tiles after the other": replace(PLAIN, group_m=1),
    "column after column": replace(PLAIN, group_m=64),
    "every step a slice": replace(PLAIN, fill=1000),
    "three slices or so": replace(PLAIN, block_m=64, block_n=64, fill=12),
    "higher than wide": replace(PLAIN, block_m=64, block_n=16, parts=2),
    "library": replace(PLAIN, gemm=LIBRARY),
    "library, parts": replace(PLAIN, gemm=LIBRARY, parts=2),
}
EVERYTHING: dict[str, Any] = {
    "activation": "gelu", "residual": True, "dropout_p": 0.2, "residual_dropout_p": 0.1, "d_out": 33,
}  # fmt: skip
ODD = Case("odd", leading=(65,), d_in=17, d_ff=67, **EVERYTHING)
GATED = Case("gated", leading=(65,), d_in=40, d_ff=51, gated=True, recompute=True, **EVERYTHING)
EVEN = Case("even", leading=(65,), d_in=72, d_ff=136, d_out=24, layout="rows", residual=True, activation="silu")
EVEN_GATED = replace(EVEN, gated=True, dropout_p=0.2)
TINY = Case("tiny", leading=(1,), d_in=8, d_ff=13, gated=True, residual=True, d_out=9, activation="relu2")


@pytest.fixture
def use_tile(monkeypatch: pytest.MonkeyPatch) -> Any:
    def use(tile: GemmTile) -> None:
        for module in (triton_launch, triton_support):
            monkeypatch.setattr(module, "pick_tile", lambda kernel, problem, arch=None: tile)

    return use


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", [ODD, GATED, TINY], ids=str)
@pytest.mark.parametrize("tile", TILES)
def test_every_kind_of_tile_holds_the_contract(
    tile: str, case: Case, dtype: torch.dtype, use_tile: Any, seed: int
) -> None:
    use_tile(TILES[tile])
    inputs = make_inputs(case, dtype, "cpu", seed)
    assert_results_within_contract(results(fused("triton"), inputs), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", [EVEN, EVEN_GATED], ids=str)
def test_tensor_descriptors_hold_the_contract(
    case: Case, dtype: torch.dtype, use_tile: Any, launched: list[Any], seed: int
) -> None:
    launched.clear()  # the test may run on several draws
    use_tile(replace(PLAIN, tma=True, fill=7))
    inputs = make_inputs(case, dtype, "cpu", seed)
    assert_results_within_contract(results(fused("triton"), inputs), inputs)
    asked = [step.arguments["USE_TMA"] for step in launched if "USE_TMA" in step.arguments]
    assert len(asked) == (7 if case.gated else 6)
    assert all(asked)


def test_what_no_descriptor_takes_is_loaded_by_pointers(use_tile: Any, launched: list[Any], seed: int) -> None:
    launched.clear()  # the test may run on several draws
    use_tile(replace(PLAIN, tma=True))
    inputs = make_inputs(ODD, torch.float32, "cpu", seed)
    assert_results_within_contract(results(fused("triton"), inputs), inputs)
    assert not any(step.arguments.get("USE_TMA") for step in launched)


@pytest.mark.parametrize("gated", [False, True])
def test_the_sums_over_tokens_are_cut_as_the_tile_says(
    gated: bool, use_tile: Any, launched: list[Any], seed: int
) -> None:
    use_tile(replace(PLAIN, block_m=64, block_n=64, fill=4))  # d_ff x d_in is 2 tiles: 2 slices
    inputs = make_inputs(Case("", leading=(65,), d_in=40, d_ff=72, gated=gated), torch.float32, "cpu", seed)
    results(fused("triton"), inputs)
    weights = [step for step in launched if step.kernel.fn.__name__ == "linear_backward_weight_kernel"]
    assert [step.grid for step in weights] == [(4,)] * (3 if gated else 2)
    assert {step.arguments["slice_rows"] for step in weights} == {64}


def problem_of_ones(tokens: int, d_ff: int, dropout_p: float, residual_dropout_p: float) -> FeedForwardProblem:
    """Of which the hidden layer is what dropout makes of ones, and so is what it gives without inner dropout."""
    weight1, bias1 = torch.zeros(d_ff, 8), torch.ones(d_ff)
    weight2, bias2 = torch.zeros(d_ff, d_ff), torch.ones(d_ff)
    seed = torch.tensor([2**32 - 5, 77])
    tensors = (torch.zeros(tokens, 8), weight1, weight2, bias1, bias2, None, None, torch.zeros(tokens, d_ff), seed)
    return FeedForwardProblem(*tensors, "relu", dropout_p, residual_dropout_p, True, "torch")


def what_dropout_makes_of_ones(problem: FeedForwardProblem, p: float, stream: int) -> Tensor:
    assert problem.seed is not None
    keep = philox.keep_mask(problem.seed, 1, problem.input.size(0), problem.weight1.size(0), p, stream)[0]
    return keep * torch.tensor(philox.keep_scale(p))


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(("tokens", "d_ff"), [(1, 13), (17, 8), (35, 71)])
def test_dropout_keeps_what_philox_says(tokens: int, d_ff: int, parts: int, use_tile: Any) -> None:
    """Forward and backward, each in its own stream, to the bit."""
    use_tile(replace(PLAIN, parts=parts))
    problem = problem_of_ones(tokens, d_ff, 0.3, 0.6)
    hidden, out = torch.empty(tokens, d_ff), torch.empty(tokens, d_ff)
    z = torch.empty(tokens, d_ff)
    for step in triton_launch.hidden_steps(problem, hidden, z, None, "interpreter"):
        step.run(hidden.device)
    inner = what_dropout_makes_of_ones(problem, 0.3, philox.STREAM_FEED_FORWARD)
    assert_equal_bits(hidden, inner, "hidden")

    out, kept, _ = triton_launch.forward(problem)
    outer = what_dropout_makes_of_ones(problem, 0.6, philox.STREAM_RESIDUAL)
    assert_equal_bits(out, outer, "out")
    assert kept is not None
    assert_equal_bits(kept, torch.ones(tokens, d_ff), "pre-activation")

    # dW2 = dropout(dY)' H: with one token after another sent back alone, every element of both masks.
    identity = problem._replace(weight2=torch.eye(d_ff))
    for token in (0, tokens - 1):
        grad_out = torch.zeros(tokens, d_ff)
        grad_out[token] = 1.0
        grads = triton_launch.backward(grad_out, z, None, identity, [True] * 7)
        assert_equal_bits(grads.bias2, outer[token], "grad bias2")  # type: ignore[arg-type]
        assert_equal_bits(grads.bias1, outer[token] * inner[token], "grad bias1")  # type: ignore[arg-type]
        assert_equal_bits(grads.weight2, outer[token][:, None] * inner[token], "grad weight2")  # type: ignore[arg-type]


@pytest.mark.parametrize("tma", [False, True])
def test_no_tokens_are_gradients_of_zero(tma: bool, use_tile: Any) -> None:
    use_tile(replace(PLAIN, tma=tma, fill=4))
    problem = problem_of_ones(0, 16, 0.3, 0.6)
    out, z, _ = triton_launch.forward(problem)
    assert out.shape == (0, 16)
    grads = triton_launch.backward(out, z, None, problem, [True] * 7)
    for name, grad in grads._asdict().items():
        tensor = getattr(problem, name)
        assert (grad is None) == (tensor is None)
        if grad is not None:
            assert_equal_bits(grad, torch.zeros_like(tensor), name)


@pytest.mark.parametrize("case", [ODD, GATED], ids=str)
def test_recomputing_changes_no_bit(case: Case, seed: int) -> None:
    kept, again = (
        results(fused("triton"), make_inputs(replace(case, recompute=recompute), torch.float16, "cpu", seed))
        for recompute in (False, True)
    )
    for name, x in again.items():
        assert_equal_bits(x, kept[name], name)


def test_a_library_computes_all_products_or_none(use_tile: Any, launched: list[Any], seed: int) -> None:
    """Of float32 at a precision of one call's own, torch cannot."""
    use_tile(replace(PLAIN, gemm=LIBRARY))
    for precision, of_library in ((None, 9), ("ieee", 0)):
        launched.clear()
        case = Case("", d_in=24, d_ff=40, gated=True, activation="silu", residual=True, precision=precision)
        inputs = make_inputs(case, torch.float32, "cpu", seed)
        assert_results_within_contract(results(fused("triton"), inputs), inputs)
        assert sum(isinstance(step, LibraryProduct) for step in launched) == of_library
        own = [step.kernel.fn.__name__ for step in launched if isinstance(step, Launch)]
        assert ("linear_backward_input_kernel" in own) == (precision is not None)


def test_explain_says_what_a_library_computes(use_tile: Any) -> None:
    x, weight1, weight2 = torch.ones(3, 8), torch.ones(16, 8), torch.ones(8, 16)
    (before,) = explain(feed_forward, x, weight1, weight2, backend="triton").decisions
    use_tile(replace(PLAIN, gemm=LIBRARY))
    (after,) = explain(feed_forward, x, weight1, weight2, backend="triton").decisions
    assert after.notes[:-1] == before.notes == ["not verified on this architecture (interpreter)"]
    named = "hidden, output, backward_hidden, backward_input, backward_weight"
    assert after.notes[-1] == f"products by torch's library, the rest by our kernels: {named}"


@pytest.mark.parametrize("tile", ["three slices or so", "library"])
@pytest.mark.parametrize(("gated", "recompute"), [(False, False), (True, False), (True, True)])
def test_the_workspace_is_what_is_allocated(
    gated: bool, recompute: bool, tile: str, monkeypatch: pytest.MonkeyPatch, use_tile: Any, seed: int
) -> None:
    use_tile(TILES[tile])
    options: dict[str, Any] = {"dropout_p": 0.1, "residual": True, "residual_dropout_p": 0.2, "recompute": recompute}
    case = Case("", leading=(65,), d_in=40, d_ff=72, gated=gated, activation="silu", **options)
    inputs = make_inputs(case, torch.float32, "cpu", seed).leaves()
    (decision,) = explain(feed_forward, **inputs.tensors, **inputs.options, backend="triton").decisions
    made: list[int] = []
    new_empty, empty_like = Tensor.new_empty, torch.empty_like

    def recorded(x: Tensor) -> Tensor:
        made.append(x.nbytes)
        return x

    monkeypatch.setattr(Tensor, "new_empty", lambda *args, **kwargs: recorded(new_empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: recorded(empty_like(*args, **kwargs)))
    out = fused("triton")(**inputs.tensors, **inputs.options)
    made.clear()
    grads = torch.autograd.grad(out, list(inputs.tensors.values()), inputs.grad_out)
    own = [grad for grad in grads if grad is not inputs.grad_out]  # the residual's
    assert decision.workspace_bytes == sum(made) - sum(grad.nbytes for grad in own)

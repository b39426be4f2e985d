"""The contract on every backend: accuracy of the result and of every gradient, determinism, untouched inputs, zero
sizes, what is kept for backward."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedformer.functional import feed_forward
from tests.kernels.feed_forward.cases import CASES, Case, Inputs, make_inputs
from tests.kernels.feed_forward.eager import (
    assert_results_within_contract,
    eager_feed_forward,
    expected,
    fused,
    results,
)
from tests.lanes import CPU, REFERENCE, TORCH, TRITON, every_backend, every_feature
from tests.tolerances import assert_equal_bits, assert_no_mistake, assert_within_contract

EVERYTHING = CASES[-1]
assert EVERYTHING.name == "everything"
SMALL = Case("small", leading=(3, 5), d_in=12, d_ff=20)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def takes(lane: Any, case: Case, dtype: torch.dtype) -> bool:
    backend, device = lane.values
    if backend == "torch":  # its own dropout mask, its own fp32 setting
        return not case.drops and case.precision is None
    # The interpreter computes products of bfloat16 wrongly.
    return not (backend == "triton" and device == "cpu" and dtype == torch.bfloat16)


@pytest.mark.parametrize(
    ("backend", "device", "case", "dtype"),
    [
        pytest.param(*lane.values, case, dtype, id=f"{lane.id}-{case}-{str(dtype)[6:]}", marks=lane.marks)
        for lane in (REFERENCE, TORCH, *CPU, *TRITON)
        for case in CASES
        for dtype in DTYPES
        if takes(lane, case, dtype)
    ],
)
def test_within_the_contract(case: Case, dtype: torch.dtype, backend: str, device: str, seed: int) -> None:
    inputs = make_inputs(case, dtype, device, seed)
    assert_results_within_contract(results(fused(backend), inputs), inputs)


@every_backend
def test_large_and_tiny_numbers(backend: str, device: str, seed: int) -> None:
    """Where exponentials overflow and activations are 0 or the identity."""
    inputs = make_inputs(replace(SMALL, activation="gelu", gated=True), torch.float32, device, seed)
    for activation in ("gelu", "gelu_tanh", "silu"):
        for scale in (1e-20, 30.0, 1e4):
            tensors = {name: x * scale if name == "input" else x for name, x in inputs.tensors.items()}
            scaled = Inputs(tensors, inputs.grad_out, {"activation": activation})
            assert_results_within_contract(results(fused(backend), scaled), scaled)


@every_backend
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_activations_and_their_derivatives(activation: str, backend: str, device: str) -> None:
    """Piece by piece of the axis, so that a cancellation in one of them is not lost in the magnitude of another."""
    ends = (*range(-5, 10), 12.0, 20.0, 40.0)  # further left the float64 truth itself cancels
    pieces = list(pairwise(ends))
    x = torch.stack([torch.linspace(*piece, 256) for piece in pieces]).to(device).view(-1, 8)
    eye = torch.eye(8, device=device)
    inputs = Inputs({"input": x, "weight1": eye, "weight2": eye}, torch.ones_like(x), {"activation": activation})
    truth, attempts = expected(inputs)
    actual = results(fused(backend), inputs)
    for name in ("out", "grad input"):
        of_pieces = (y.view(len(pieces), -1) for y in (actual[name], truth[name], attempts[0][name]))
        for piece, ours, true, eager in zip(pieces, *of_pieces, strict=True):
            assert_within_contract(ours, true, eager, f"{name} between {piece[0]:g} and {piece[1]:g}")


@every_backend
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu", "relu2"])
def test_nan_and_infinity_come_through(activation: str, backend: str, device: str) -> None:
    """As in torch: no activation makes a number of a NaN, and what belongs to other tokens is untouched."""
    weight = torch.eye(8, device=device)
    x = torch.randn(5, 8, device=device)
    clean = feed_forward(x, weight, weight, activation=activation, backend=backend)
    x[1, 3], x[2, 4] = float("nan"), float("inf")
    out = feed_forward(x, weight, weight, activation=activation, backend=backend)
    assert out[1].isnan().any()
    assert not out[2].isfinite().all()
    for token in (0, 3, 4):
        assert_equal_bits(out[token], clean[token])


@every_feature
def test_same_bits_twice(backend: str, device: str, seed: int) -> None:
    case = EVERYTHING if backend == "cpu" else replace(SMALL, gated=True, residual=True, dropout_p=0.2)
    inputs = make_inputs(case, torch.float32, device, seed)
    first, second = (results(fused(backend), inputs) for _ in range(2))
    for name, x in second.items():
        assert_equal_bits(x, first[name], name)


@every_feature
@pytest.mark.parametrize("gated", [False, True])
def test_recomputing_changes_little(gated: bool, backend: str, device: str, seed: int) -> None:
    inputs = make_inputs(replace(SMALL, gated=gated, activation="silu", dropout_p=0.2), torch.float32, device, seed)
    kept, again = (results(fused(backend, recompute=recompute), inputs) for recompute in (False, True))
    for name, x in again.items():
        assert_no_mistake(x, kept[name], name)


@every_backend
def test_nothing_given_is_written_and_backward_runs_twice(backend: str, device: str, seed: int) -> None:
    case = replace(SMALL, gated=True, residual=True)
    case = case if backend == "torch" else replace(case, dropout_p=0.2, residual_dropout_p=0.1)
    inputs = make_inputs(case, torch.float32, device, seed)
    leaves = inputs.leaves()
    given = [*leaves.tensors.values(), inputs.grad_out, *(x for x in leaves.options.values() if isinstance(x, Tensor))]
    before, versions = [x.detach().clone() for x in given], [x._version for x in given]
    out = fused(backend)(**leaves.tensors, **leaves.options)
    result = out.detach().clone()
    wanted = list(leaves.tensors.values())
    first = torch.autograd.grad(out, wanted, inputs.grad_out, retain_graph=True)
    second = torch.autograd.grad(out, wanted, inputs.grad_out)
    for name, one, two in zip(leaves.tensors, first, second, strict=True):
        assert_equal_bits(two, one, name)
    assert_equal_bits(out.detach(), result)
    for x, copy, version in zip(given, before, versions, strict=True):
        assert x._version == version
        assert torch.equal(x, copy)


@every_backend
@pytest.mark.parametrize("leading", [(0,), (2, 0), (0, 3)])
def test_no_tokens(leading: tuple[int, ...], backend: str, device: str, seed: int) -> None:
    inputs = make_inputs(Case("", leading=leading, gated=True, residual=True), torch.float32, device, seed)
    actual = results(fused(backend), inputs)
    assert actual["out"].shape == (*leading, 24)
    for name, x in inputs.tensors.items():
        grad = actual[f"grad {name}"]
        assert grad.shape == x.shape
        assert (grad == 0).all()


@every_backend
def test_gradients_only_where_they_are_asked_for(backend: str, device: str, seed: int) -> None:
    case = replace(SMALL, gated=True, residual=True, activation="gelu")
    inputs = make_inputs(case, torch.float32, device, seed)
    everything = results(fused(backend), inputs)
    for name, x in inputs.tensors.items():
        leaf = x.detach().requires_grad_()
        out = fused(backend)(**(inputs.tensors | {name: leaf}), **inputs.options)
        (grad,) = torch.autograd.grad(out, leaf, inputs.grad_out)
        assert_equal_bits(grad, everything[f"grad {name}"], name)


@every_backend
def test_a_gradient_of_any_strides(backend: str, device: str, seed: int) -> None:
    inputs = make_inputs(replace(SMALL, activation="gelu"), torch.float32, device, seed)
    for grad_out in (torch.ones(1, device=device).expand(3, 5, 12), inputs.grad_out.mT.contiguous().mT):
        strided = Inputs(inputs.tensors, grad_out, inputs.options)
        dense = Inputs(inputs.tensors, grad_out.contiguous(), inputs.options)
        expected = results(fused(backend), dense)
        for name, x in results(fused(backend), strided).items():
            assert_no_mistake(x, expected[name], name)


def bytes_kept(function: Any, inputs: Inputs) -> int:
    """What autograd keeps for backward, beside what it was given."""
    leaves = inputs.leaves()
    given = (*leaves.tensors.values(), *leaves.options.values())
    own = {x.untyped_storage().data_ptr() for x in given if isinstance(x, Tensor)}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = function(**leaves.tensors, **leaves.options)
    assert out.requires_grad
    return sum(kept.values())


def as_torch_does(**tensors: Any) -> Tensor:
    """With torch's own dropout, which keeps a mask."""
    dropout_p, act = tensors["dropout_p"], getattr(torch.nn.functional, tensors["activation"])
    x, linear = tensors["input"], torch.nn.functional.linear
    hidden = linear(x, tensors["weight1"], tensors["bias1"])
    if "gate_weight" in tensors:
        hidden = act(linear(x, tensors["gate_weight"], tensors["gate_bias"])) * hidden
    else:
        hidden = act(hidden)
    hidden = torch.nn.functional.dropout(hidden, dropout_p)
    return linear(hidden, tensors["weight2"], tensors["bias2"])


@pytest.mark.parametrize(("backend", "device"), [*CPU, *TRITON])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_bytes_kept_for_backward(activation: str, gated: bool, backend: str, device: str, seed: int) -> None:
    case = Case("", d_in=8, d_ff=64, gated=gated, activation=activation, dropout_p=0.1)
    inputs = make_inputs(case, torch.float16, device, seed)
    eager = bytes_kept(as_torch_does, inputs)
    assert bytes_kept(fused(backend), inputs) <= 0.5 * eager
    assert bytes_kept(fused(backend, recompute=True), inputs) <= 0.2 * eager


def test_the_bytes_are_counted(seed: int) -> None:
    """Three hidden tensors: what ReLU gave, dropout's mask, what dropout gave."""
    inputs = make_inputs(Case("", d_in=8, d_ff=64, dropout_p=0.1), torch.float32, "cpu", seed)
    for function in (as_torch_does, eager_feed_forward):
        assert bytes_kept(function, inputs) >= 3 * 17 * 64 * 4

"""What every backend promises: accuracy, determinism, empty inputs, inputs and kept tensors left alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fusedformer.functional import dropout_add_layer_norm
from fusedformer.kernels.common import native
from tests.kernels.norm.cases import CASES, DTYPES, NORMS, Case, make_inputs
from tests.kernels.norm.eager import assert_results_within_contract, expected, fused, results
from tests.lanes import RUNNABLE, built, every_backend, every_feature, interpreted
from tests.tolerances import assert_equal_bits, assert_no_mistake


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_native_level_holds_the_contract(case: Case, dtype: torch.dtype, seed: int) -> None:
    inputs = make_inputs(case, dtype, "cpu", seed)
    truth, attempts = expected(inputs)
    for name in RUNNABLE:
        with native.use_level(name):
            assert_results_within_contract(results(fused(inputs, "cpu"), inputs), truth, attempts, f"{name}: ")


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_interpreted_kernels_hold_the_contract(case: Case, dtype: torch.dtype, seed: int) -> None:
    inputs = make_inputs(case, dtype, "cpu", seed)
    assert_results_within_contract(results(fused(inputs, "triton"), inputs), *expected(inputs))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, Case("long", shape=(70, 16384), dropout_p=0.1)], ids=str)
def test_kernels_hold_the_contract_on_the_gpu(case: Case, dtype: torch.dtype, seed: int) -> None:
    inputs = make_inputs(case, dtype, "cuda", seed)
    assert_results_within_contract(results(fused(inputs, "triton"), inputs), *expected(inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_eager_backends_hold_the_contract(case: Case, backend: str, dtype: torch.dtype, seed: int) -> None:
    if backend == "torch" and case.dropout_p:
        case = replace(case, dropout_p=0.0)  # its mask is its own, see test_dropout.py
    inputs = make_inputs(case, dtype, "cpu", seed)
    assert_results_within_contract(results(fused(inputs, backend), inputs), *expected(inputs))


@interpreted
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(3, 16384), (600, 24)], ids=str)
def test_interpreted_kernels_of_long_rows_and_of_many(shape: tuple[int, ...], norm: str, seed: int) -> None:
    """Rows too long for the kernel that goes along them to sum the parameters' gradients; more than a tile for each
    program."""
    inputs = make_inputs(Case("", shape=shape, norm=norm, dropout_p=0.1), torch.float32, "cpu", seed)
    assert_results_within_contract(results(fused(inputs, "triton"), inputs), *expected(inputs))


@every_backend
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(0, 7), (2, 0, 7)], ids=str)
def test_no_rows(shape: tuple[int, ...], norm: str, backend: str, device: str, seed: int) -> None:
    inputs = make_inputs(Case("", shape=shape, norm=norm), torch.float32, device, seed)
    actual = results(fused(inputs, backend), inputs)
    for name in ("out", "sum", "grad input", "grad residual"):
        assert actual[name].shape == shape
    for name in ("grad weight", "grad bias") if norm == "layer_norm" else ("grad weight",):
        assert_equal_bits(actual[name], torch.zeros(7, device=device), name)


@every_feature
@pytest.mark.parametrize("case", [Case("", dropout_p=0.3), Case("", norm="rms_norm", shape=(200, 40))], ids=str)
def test_the_same_bits_again(case: Case, backend: str, device: str, seed: int) -> None:
    inputs = make_inputs(case, torch.float32, device, seed)
    first, second = (results(fused(inputs, backend), inputs) for _ in range(2))
    for name, x in second.items():
        assert_equal_bits(x, first[name], name)


@every_backend
@pytest.mark.parametrize("norm", NORMS)
def test_inputs_and_kept_tensors_are_left_alone(norm: str, backend: str, device: str, seed: int) -> None:
    inputs = make_inputs(Case("", norm=norm), torch.float32, device, seed)
    leaves = inputs.leaves()
    outputs = fused(inputs, backend)(**leaves)
    given = (*leaves.values(), *outputs, inputs.grad_out, inputs.grad_sum)
    before = [x.detach().clone() for x in given]
    sent = (inputs.grad_out, inputs.grad_sum)
    first, second = (
        torch.autograd.grad(outputs, list(leaves.values()), sent, retain_graph=again) for again in (True, False)
    )
    for one, other in zip(first, second, strict=True):
        assert_equal_bits(one, other)
    for x, copy in zip(given, before, strict=True):
        assert_equal_bits(x.detach(), copy)


@every_backend
@pytest.mark.parametrize("norm", NORMS)
def test_with_and_without_gradients_and_sum(norm: str, backend: str, device: str, seed: int) -> None:
    """What is kept for backward changes no result, nor does what is returned."""
    inputs = make_inputs(Case("", norm=norm), torch.float16, device, seed)
    out, total = fused(inputs, backend)(**inputs.tensors)
    assert_equal_bits(fused(inputs, backend)(**inputs.leaves())[0].detach(), out)
    for tensors in (inputs.tensors, inputs.leaves()):
        alone: Any = fused(inputs, backend, return_sum=False)(**tensors)
        assert isinstance(alone, torch.Tensor)
        assert_equal_bits(alone.detach(), out)
    assert_equal_bits(total, inputs.tensors["input"] + inputs.tensors["residual"])


@every_feature
@pytest.mark.parametrize("sent", ["out", "sum"])
def test_a_gradient_through_one_result_alone(sent: str, backend: str, device: str, seed: int) -> None:
    inputs = make_inputs(Case("", dropout_p=0.3), torch.float32, device, seed)
    nothing = torch.zeros_like(inputs.grad_out)
    inputs = replace(inputs, grad_sum=nothing) if sent == "out" else replace(inputs, grad_out=nothing)
    both = results(fused(inputs, backend), inputs)
    leaves = inputs.leaves()
    out, total = fused(inputs, backend)(**leaves)
    chosen, grad = (out, inputs.grad_out) if sent == "out" else (total, inputs.grad_sum)
    grads = torch.autograd.grad(chosen, list(leaves.values()), grad, allow_unused=True, materialize_grads=True)
    for name, x in zip(leaves, grads, strict=True):
        assert_equal_bits(x, both[f"grad {name}"], name)


@every_backend
def test_the_sum_of_nothing_added_is_the_input(backend: str, device: str, seed: int) -> None:
    inputs = make_inputs(Case("", residual=""), torch.float32, device, seed)
    leaf = inputs.tensors["input"].detach().requires_grad_()
    assert fused(inputs, backend)(leaf)[1] is leaf


@every_feature
@pytest.mark.parametrize("norm", NORMS)
def test_equal_features(norm: str, backend: str, device: str) -> None:
    """No variance: what remains is eps."""
    case = Case("", norm=norm, residual="", parameters="b", shape=(2, 33))
    inputs = make_inputs(case, torch.float32, device, 0)
    inputs = replace(inputs, tensors=inputs.tensors | {"input": torch.full((2, 33), 0.1, device=device)})
    out, _ = fused(inputs, backend)(**inputs.tensors)
    truth = inputs.tensors["bias"].double().expand(2, 33) if norm == "layer_norm" else torch.ones(2, 33).double()
    if norm == "layer_norm":
        assert (out - truth.to(out)).abs().max() < 1e-4  # the mean's rounding, over the root of eps
    else:
        assert_no_mistake(out, truth.to(device))


@every_backend
def test_a_nan_stays_in_its_row(backend: str, device: str) -> None:
    x = torch.randn(3, 40, device=device)
    x[1, 7] = float("nan")
    out = dropout_add_layer_norm(x, None, None, None, backend=backend)
    assert out[1].isnan().all()
    assert not out[[0, 2]].isnan().any()

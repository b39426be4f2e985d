"""Composes with torch: function transforms, higher derivatives, checkpointing, autocast, and what opcheck asks of an
operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fusedformer.functional import feed_forward
from tests.kernels.feed_forward.cases import Case, Inputs, make_inputs
from tests.kernels.feed_forward.eager import call, eager_feed_forward, fused, results
from tests.lanes import each_backend, each_feature, each_kernel
from tests.operators import Calls
from tests.tolerances import assert_equal_bits, assert_no_mistake

MIXED = Case(
    "mixed", leading=(2, 3), d_in=8, d_ff=12, d_out=5, gated=True, activation="gelu", residual=True, dropout_p=0.3,
    residual_dropout_p=0.2,
)  # fmt: skip
PLAIN = replace(MIXED, dropout_p=0.0, residual_dropout_p=0.0)


def problem(backend: str) -> Case:
    return PLAIN if backend == "torch" else MIXED


@each_kernel
@pytest.mark.parametrize(
    "case",
    [
        MIXED,
        replace(MIXED, recompute=True),
        replace(PLAIN, layout="rows", gated=False, residual=False, without=("bias1", "bias2")),
    ],
    ids=["mixed", "recompute", "rows"],
)
def test_opcheck(case: Case, backend: str, device: str, seed: int) -> None:
    inputs = make_inputs(case, torch.float32, device, seed)
    with Calls() as calls:
        results(fused(backend), inputs)
    assert calls.made.keys() == {"feed_forward_forward", "feed_forward_backward"}
    for func, args in calls.made.values():
        torch.library.opcheck(func, tuple(x.detach() if isinstance(x, Tensor) else x for x in args))


@each_backend
def test_func_grad(backend: str, device: str, seed: int) -> None:
    inputs = make_inputs(problem(backend), torch.float32, device, seed)

    def loss(tensors: dict[str, Tensor]) -> Tensor:
        return (fused(backend)(**tensors, **inputs.options) * inputs.grad_out).sum()

    expected = results(fused(backend), inputs)
    for name, x in torch.func.grad(loss)(inputs.tensors).items():
        assert_no_mistake(x, expected[f"grad {name}"], name)


def vmapped(function: Callable[..., Any], in_dims: tuple[int | None, ...], *tensors: Tensor) -> tuple[Any, Any]:
    """``function`` under vmap, and over a loop."""
    loop = [
        function(*(x if dim is None else x.select(dim, i) for x, dim in zip(tensors, in_dims, strict=True)))
        for i in range(2)
    ]
    return torch.func.vmap(function, in_dims=in_dims)(*tensors), torch.stack(loop)


IN_DIMS = {
    "input": (0, None, None, None),
    "input and residual": (1, None, None, 2),
    "residual": (None, None, None, 0),
    "weights": (None, 0, 1, None),
    "all": (2, 1, 0, 0),
}
SHAPES = ((3, 8), (12, 8), (6, 12), (3, 6))


@each_backend
@pytest.mark.parametrize("wanted", [(), (0,), (0, 1, 2, 3)], ids=["forward", "gradient of input", "all gradients"])
@pytest.mark.parametrize("in_dims", IN_DIMS)
def test_vmap(in_dims: str, wanted: tuple[int, ...], backend: str, device: str) -> None:
    dims = IN_DIMS[in_dims]
    tensors = [
        torch.randn(shape if dim is None else (*shape[:dim], 2, *shape[dim:]), device=device)
        for shape, dim in zip(SHAPES, dims, strict=True)
    ]
    weight = torch.randn(3, 6, device=device)

    def function(*given: Tensor) -> Tensor:
        return feed_forward(*given[:3], residual=given[3], activation="silu", backend=backend)

    def gradients(*given: Tensor) -> Tensor:
        grads = torch.func.grad(lambda *x: (function(*x) * weight).sum(), argnums=wanted)(*given)
        return torch.cat([grad.flatten() for grad in grads])

    actual, expected = vmapped(gradients if wanted else function, dims, *tensors)
    assert_no_mistake(actual, expected)


@each_feature
def test_vmap_when_recomputing(backend: str, device: str) -> None:
    x, weight1, weight2 = (torch.randn(shape, device=device) for shape in ((2, 3, 8), (12, 8), (6, 12)))
    loss = lambda x: feed_forward(x, weight1, weight2, activation="gelu", recompute=True, backend=backend).sum()
    actual, expected = vmapped(torch.func.grad(loss), (0,), x)
    assert_no_mistake(actual, expected)


@each_feature
@pytest.mark.parametrize("seeds", ["shared", "own"])
def test_vmap_with_dropout_is_the_loop(seeds: str, backend: str, device: str) -> None:
    x, weight1, weight2 = (torch.randn(shape, device=device) for shape in ((2, 3, 8), (12, 8), (8, 12)))
    seed = torch.randint(0, 99, (2,) if seeds == "shared" else (2, 2), device=device)
    options: dict[str, Any] = {"dropout_p": 0.5, "residual_dropout_p": 0.3, "backend": backend}
    function = lambda x, seed: feed_forward(x, weight1, weight2, residual=x, seed=seed, **options)
    dims = (0, None if seeds == "shared" else 1)
    actual, expected = vmapped(function, dims, x, seed)
    assert_no_mistake(actual, expected)
    gradient = torch.func.grad(lambda x, seed: function(x, seed).square().sum())
    actual, expected = vmapped(gradient, dims, x, seed)
    assert_no_mistake(actual, expected)


@each_backend
def test_jacrev(backend: str, device: str, seed: int) -> None:
    inputs = make_inputs(problem(backend), torch.float32, device, seed)

    def through(chosen: str, name: str) -> Tensor:
        function = lambda x: fused(chosen)(**inputs.tensors | {name: x}, **inputs.options)[0, :2, :2]
        jacobian: Tensor = torch.func.jacrev(function)(inputs.tensors[name])
        return jacobian

    for name in ("input", "bias1"):
        assert_no_mistake(through(backend, name), through("reference", name))


@each_kernel
def test_forward_mode_is_refused(backend: str, device: str) -> None:
    """Without a formula for it the tangents would be lost in silence."""
    x, weight = torch.randn(3, 8, device=device), torch.randn(8, 8, device=device)
    function = partial(feed_forward, weight1=weight, weight2=weight, backend=backend)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        function(forward_ad.make_dual(x, x))
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(function, (x,), (x,))


def second_order(inputs: Inputs, function: Callable[..., Tensor]) -> dict[str, Tensor]:
    """The gradient of a random combination of the first gradients, and of the gradient sent in."""
    leaves, grad_out = inputs.leaves(), inputs.grad_out.detach().requires_grad_()
    out = function(**leaves.tensors, **leaves.options)
    first = torch.autograd.grad(out, list(leaves.tensors.values()), grad_out, create_graph=True)
    generator = torch.Generator().manual_seed(0)
    terms = [(grad * torch.randn(grad.shape, generator=generator).to(grad)).sum() for grad in first]
    named = leaves.tensors | {"grad_out": grad_out}
    second = torch.autograd.grad(terms, list(named.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(named, second, strict=True))


@each_backend
@pytest.mark.parametrize("recompute", [False, True])
def test_double_backward(recompute: bool, backend: str, device: str, seed: int) -> None:
    inputs = make_inputs(replace(problem(backend), recompute=recompute), torch.float32, device, seed)
    truth = second_order(inputs.to(torch.float64), eager_feed_forward)
    for name, x in second_order(inputs, fused(backend)).items():
        assert_no_mistake(x, truth[name], name)


@each_kernel
def test_double_backward_of_one_gradient(backend: str, device: str, seed: int) -> None:
    """A gradient penalty: the input alone requires a gradient."""
    inputs = make_inputs(MIXED, torch.float32, device, seed)

    def penalty(function: Callable[..., Tensor], given: Inputs) -> Tensor:
        x = given.tensors["input"].detach().requires_grad_()
        out = function(**given.tensors | {"input": x}, **given.options)
        (first,) = torch.autograd.grad(out, x, given.grad_out, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    assert_no_mistake(penalty(fused(backend), inputs), penalty(eager_feed_forward, inputs.to(torch.float64)))


@each_backend
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_draws_the_same_dropout_again(use_reentrant: bool, backend: str, device: str, seed: int) -> None:
    inputs = make_inputs(PLAIN, torch.float32, device, seed)
    names = list(inputs.tensors)

    def plain(*tensors: Tensor) -> Tensor:
        given = dict(zip(names, tensors, strict=True))
        return call(**given, dropout_p=0.4, residual_dropout_p=0.3, backend=backend)

    def gradients(run: Callable[..., Tensor]) -> list[Tensor]:
        leaves = inputs.leaves()
        torch.manual_seed(seed)
        out = run(*leaves.tensors.values())
        out.backward(inputs.grad_out)  # the reentrant form knows no torch.autograd.grad
        return [out.detach(), *(x.grad for x in leaves.tensors.values() if x.grad is not None)]

    expected = gradients(plain)
    actual = gradients(partial(checkpoint, plain, use_reentrant=use_reentrant))
    assert len(actual) == len(expected) == 1 + len(names)
    for one, other in zip(actual, expected, strict=True):
        assert_equal_bits(one, other)


def under_autocast(backend: str, device: str) -> Callable[..., Tensor]:
    """The forward call alone: torch advises against backward under autocast."""

    def function(**given: Any) -> Tensor:
        with torch.autocast(device, dtype=torch.float16):
            return fused(backend)(**given)

    return function


@each_backend
def test_autocast(backend: str, device: str, seed: int) -> None:
    inputs = make_inputs(problem(backend), torch.float32, device, seed)
    half = inputs.to(torch.float16)
    inside = results(under_autocast(backend, device), replace(inputs, grad_out=half.grad_out))
    outside = results(fused(backend), half)
    assert inside["out"].dtype == torch.float16
    for name, x in inside.items():
        assert x.dtype == (torch.float16 if name == "out" else torch.float32)
        assert_equal_bits(x, outside[name].to(x.dtype), name)


@each_feature
def test_autocast_does_not_reach_into_the_computation(backend: str, device: str, seed: int) -> None:
    inputs = make_inputs(problem(backend), torch.float16, device, seed)
    outside, inside = results(fused(backend), inputs), results(under_autocast(backend, device), inputs)
    for name, x in inside.items():
        assert_equal_bits(x, outside[name], name)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_an_activation_of_ones_own_runs_under_the_callers_autocast(backend: str, gated: bool, seed: int) -> None:
    """A module with weights in float32 has to."""
    inputs = make_inputs(replace(PLAIN, gated=gated), torch.float32, "cpu", seed)
    given: dict[str, Any] = inputs.tensors
    d_ff = given["weight1"].size(0)
    activation = torch.nn.Sequential(torch.nn.Linear(d_ff, d_ff), torch.nn.PReLU())
    with torch.autocast("cpu", torch.bfloat16):
        out = feed_forward(**given, activation=activation, backend=backend).detach()
        value = F.linear(given["input"], given["weight1"], given["bias1"])
        gate = F.linear(given["input"], given["gate_weight"], given["gate_bias"]) if gated else value
        expected = F.linear(activation(gate) * (value if gated else 1.0), given["weight2"], given["bias2"])
        if "residual" in given:
            expected = given["residual"].bfloat16() + expected
    assert out.dtype == torch.bfloat16
    assert_no_mistake(out, expected.double())


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_autocast_leaves_float64_alone(backend: str, seed: int) -> None:
    inputs = make_inputs(PLAIN, torch.float64, "cpu", seed)
    assert under_autocast(backend, "cpu")(**inputs.tensors, **inputs.options).dtype == torch.float64


@each_backend
def test_the_same_tensor_in_several_places(backend: str, device: str, seed: int) -> None:
    """A network with a residual around it, its second layer the first one's transposed."""
    x, weight = torch.randn(5, 8, device=device), torch.randn(8, 8, device=device)
    given = {"input": x, "weight1": weight, "weight2": weight, "residual": x}
    apart = results(fused(backend), Inputs(given, torch.ones(5, 8, device=device), {"activation": "silu"}))
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    out = feed_forward(x, weight, weight, residual=x, activation="silu", backend=backend)
    assert_equal_bits(out.detach(), apart["out"])
    grads = torch.autograd.grad(out.sum(), (x, weight))
    torch.testing.assert_close(grads[0], apart["grad input"] + apart["grad residual"])
    torch.testing.assert_close(grads[1], apart["grad weight1"] + apart["grad weight2"])

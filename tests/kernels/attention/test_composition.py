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
from torch.utils.checkpoint import checkpoint

from fusedformer.functional import attention, attention_weights
from tests.cases import Case, Inputs, make_inputs
from tests.kernels.attention.eager import assert_results_within_contract, call, eager, fused, results
from tests.lanes import CPU, REFERENCE, built, every_backend, every_feature, every_kernel, interpreted
from tests.operators import Calls
from tests.tolerances import assert_equal_bits, assert_no_mistake

MIXED = Case(
    "mixed", batch=1, heads=2, heads_kv=1, len_q=5, len_k=9, head_dim=8, value_dim=6, is_causal=True, key_mask="bool",
    causal_alignment="bottom_right", mask="float 1HLS", softcap=2.0, sinks=True, dropout_p=0.3, layout="BLHE",
)  # fmt: skip
FOR_TORCH = Case(
    "for torch", heads=2, heads_kv=1, len_q=5, len_k=9, head_dim=8, is_causal=True, key_mask="bool", layout="BLHE"
)
SMALL = Case("small", batch=1, heads=1, len_q=5, head_dim=8)


def problem(backend: str) -> Case:
    return FOR_TORCH if backend == "torch" else MIXED


def operator_calls(case: Case, backend: str, seed: int) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Our operators by name, with the arguments of a forward, a backward and a pass for the weights; all detached."""
    inputs = make_inputs(case, torch.float32, "cpu", seed)
    with Calls() as calls:
        results(fused(backend), inputs, with_lse=backend != "torch")
        if backend != "torch":
            _, lse = fused(backend)(inputs.query, inputs.key, inputs.value, **inputs.options)
            options = {name: x for name, x in inputs.options.items() if name != "sinks"}
            attention_weights(inputs.query, inputs.key, lse, **options, backend=backend)
    return {
        name: (func, tuple(x.detach() if isinstance(x, Tensor) else x for x in args))
        for name, (func, args) in calls.made.items()
    }


@pytest.mark.parametrize(
    ("backend", "case"),
    [
        pytest.param("torch", FOR_TORCH, id="torch"),
        pytest.param("torch", replace(FOR_TORCH, heads_kv=None, layout="LBHE"), id="torch-LBHE"),
        pytest.param("cpu", MIXED, id="cpu", marks=built),
        pytest.param("cpu", replace(SMALL, layout="LBHE", key_mask="float"), id="cpu-LBHE", marks=built),
        pytest.param("triton", MIXED, id="triton", marks=interpreted),
        pytest.param("triton", replace(SMALL, layout="LBHE", key_mask="float"), id="triton-LBHE", marks=interpreted),
        pytest.param("triton", replace(SMALL, mask="bool LS"), id="triton-bool", marks=interpreted),
    ],
)  # fmt: skip
def test_opcheck(backend: str, case: Case, seed: int) -> None:
    calls = operator_calls(case, backend, seed)
    expected = {"attention_forward", "attention_backward"} | (set() if backend == "torch" else {"attention_weights"})
    assert calls.keys() == expected
    for func, args in calls.values():
        torch.library.opcheck(func, args)


@every_backend
def test_func_grad(backend: str, device: str, seed: int) -> None:
    inputs = make_inputs(problem(backend), torch.float32, device, seed)

    def loss(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out, _ = fused(backend)(query, key, value, **inputs.options)
        return (out * inputs.grad_out).sum()

    transformed = torch.func.grad(loss, argnums=(0, 1, 2))(inputs.query, inputs.key, inputs.value)
    actual = results(fused(backend), replace(inputs, grad_lse=torch.zeros_like(inputs.grad_lse)), with_lse=False)
    for name, x in zip(("query", "key", "value"), transformed, strict=True):
        torch.testing.assert_close(x, actual[f"grad {name}"])


def vmapped(
    function: Callable[..., Tensor], in_dims: tuple[int | None, ...], *tensors: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``function`` under vmap, and over a loop."""
    loop = [
        function(
            *(x if dim is None or x is None else x.select(dim, i) for x, dim in zip(tensors, in_dims, strict=True))
        )
        for i in range(2)
    ]
    return torch.func.vmap(function, in_dims=in_dims)(*tensors), torch.stack(loop)


IN_DIMS = {
    "query alone": (0, None, None, None),
    "all": (0, 0, 0, 0),
    "elsewhere": (1, 2, 4, 3),
    "mask shared": (0, 0, 0, None),
    "mask alone": (None, None, None, 0),
}


@every_backend
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize("in_dims", IN_DIMS)
def test_vmap(in_dims: str, gradient: bool, backend: str, device: str) -> None:
    dims = IN_DIMS[in_dims]
    shapes = [(3, 1, 5, 8), (3, 1, 7, 8), (3, 1, 7, 8), (1, 1, 5, 7)]
    tensors = [torch.randn(shape, device=device) for shape in shapes]
    tensors = [
        x if dim is None else torch.randn(*shape[:dim], 2, *shape[dim:], device=device)
        for x, dim, shape in zip(tensors, dims, shapes, strict=True)
    ]
    weight = torch.randn(3, 1, 5, 8, device=device)

    def function(*given: Tensor) -> Tensor:
        query, key, value, mask = given
        return attention(query, key, value, mask, is_causal=True, backend=backend)

    def gradients(*given: Tensor) -> Tensor:
        grads = torch.func.grad(lambda *x: (function(*x) * weight).sum(), argnums=(0, 1, 2, 3))(*given)
        return torch.cat([grad.flatten() for grad in grads])

    actual, expected = vmapped(gradients if gradient else function, dims, *tensors)
    torch.testing.assert_close(actual, expected)


@every_feature
def test_vmap_over_masks_sinks_and_padding(backend: str, device: str) -> None:
    query, key = torch.randn(2, 2, 5, 8, device=device), torch.randn(2, 2, 7, 8, device=device)
    padding = torch.rand(2, 2, 7, device=device) > 0.3
    bias, sinks = torch.randn(2, 2, 7, device=device), torch.randn(2, 2, device=device)

    def function(padding: Tensor, bias: Tensor, sinks: Tensor) -> Tensor:
        return attention(query, key, key, bias[:, None, None], key_mask=padding, sinks=sinks, backend=backend)

    actual, expected = vmapped(function, (0, 0, 0), padding, bias, sinks)
    torch.testing.assert_close(actual, expected)


@every_feature
@pytest.mark.parametrize("seeds", ["shared", "own"])
def test_vmap_with_dropout_is_the_loop(seeds: str, backend: str, device: str) -> None:
    query, weight = torch.randn(2, 2, 1, 5, 8, device=device), torch.randn(2, 1, 5, 8, device=device)
    seed = torch.randint(0, 99, (2,) if seeds == "shared" else (2, 2), device=device)
    function = lambda x, seed: attention(x, x, x, dropout_p=0.5, seed=seed, backend=backend)
    dims = (0, None if seeds == "shared" else 0)
    actual, expected = vmapped(function, dims, query, seed)
    assert_equal_bits(actual, expected)
    gradient = torch.func.grad(lambda x, seed: (function(x, seed) * weight).sum())
    actual, expected = vmapped(gradient, dims, query, seed)
    torch.testing.assert_close(actual, expected)


@every_backend
def test_jacrev(backend: str, device: str, seed: int) -> None:
    inputs = make_inputs(replace(problem(backend), batch=2), torch.float32, device, seed)

    def through(chosen: str) -> Tensor:
        function = lambda query: attention(query, inputs.key, inputs.value, **inputs.options, backend=chosen)[
            1, 1, :2, :2
        ]
        jacobian: Tensor = torch.func.jacrev(function)(inputs.query)
        return jacobian

    assert_no_mistake(through(backend), through("reference"))


@every_kernel
def test_forward_mode_is_refused(backend: str, device: str) -> None:
    """Without a formula for it the tangents would be lost in silence."""
    query, tangent = torch.randn(1, 1, 5, 8, device=device), torch.randn(1, 1, 5, 8, device=device)
    function = partial(attention, key=query, value=query, backend=backend)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        function(forward_ad.make_dual(query, tangent))
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(function, (query,), (tangent,))


def second_order(inputs: Inputs, function: Callable[..., tuple[Tensor, Tensor]], with_lse: bool) -> dict[str, Tensor]:
    """The gradient of a random combination of the first gradients, and of the gradients sent in."""
    leaves, named = inputs.leaves()
    sent = [inputs.grad_out.detach().requires_grad_(), inputs.grad_lse.detach().requires_grad_()][: 1 + with_lse]
    out, lse = function(leaves.query, leaves.key, leaves.value, **leaves.options)
    first = torch.autograd.grad((out, lse)[: 1 + with_lse], list(named.values()), sent, create_graph=True)
    generator = torch.Generator().manual_seed(0)
    terms = [(grad * torch.randn(grad.shape, generator=generator).to(grad)).sum() for grad in first]
    named |= {"grad_out": sent[0]} | ({"grad_lse": sent[1]} if with_lse else {})
    second = torch.autograd.grad(terms, list(named.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(named, second, strict=True))


@every_backend
def test_double_backward(backend: str, device: str, seed: int) -> None:
    """pytorch#116350: torch's fused attentions have none."""
    inputs = make_inputs(problem(backend), torch.float32, device, seed)
    with_lse = backend != "torch"
    actual = second_order(inputs, fused(backend), with_lse)
    truth = second_order(inputs.to(torch.float64), eager(), with_lse)
    for name, x in actual.items():
        assert_no_mistake(x, truth[name], name)


@every_backend
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_draws_the_same_dropout_again(use_reentrant: bool, backend: str, device: str, seed: int) -> None:
    inputs = make_inputs(Case("", batch=1, head_dim=8), torch.float32, device, seed)

    def gradients(run: Callable[..., Tensor]) -> list[Tensor]:
        leaves, named = inputs.leaves()
        torch.manual_seed(seed)
        out = run(leaves.query, leaves.key, leaves.value)
        out.backward(inputs.grad_out)  # the reentrant form knows no torch.autograd.grad
        return [out.detach(), *(x.grad for x in named.values() if x.grad is not None)]

    plain = partial(call, dropout_p=0.4, backend=backend)
    expected = gradients(plain)
    actual = gradients(partial(checkpoint, plain, use_reentrant=use_reentrant))
    assert len(actual) == len(expected) == 4
    for one, other in zip(actual, expected, strict=True):
        assert_equal_bits(one, other)


def under_autocast(backend: str, device: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The forward call alone: torch advises against backward under autocast."""

    def function(*tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        with torch.autocast(device, dtype=torch.float16):
            return fused(backend)(*tensors, **options)

    return function


@every_backend
def test_autocast(backend: str, device: str, seed: int) -> None:
    inputs = make_inputs(Case("", heads=4, heads_kv=2, is_causal=True), torch.float32, device, seed)
    half = replace(
        inputs,
        query=inputs.query.half(),
        key=inputs.key.half(),
        value=inputs.value.half(),
        grad_out=inputs.grad_out.half(),
    )
    inside = results(under_autocast(backend, device), replace(inputs, grad_out=half.grad_out), with_lse=False)
    outside = results(fused(backend), half, with_lse=False)
    assert inside["out"].dtype == torch.float16
    for name, x in inside.items():
        assert x.dtype == (torch.float16 if name == "out" else torch.float32)
        assert_equal_bits(x, outside[name].to(x.dtype), name)


@every_feature
def test_autocast_does_not_reach_into_the_computation(backend: str, device: str, seed: int) -> None:
    inputs = make_inputs(Case("", mask="float32 1HLS"), torch.float16, device, seed)
    outside, inside = results(fused(backend), inputs), results(under_autocast(backend, device), inputs)
    for name, x in inside.items():
        assert_equal_bits(x, outside[name], name)


def test_autocast_leaves_float64_alone(seed: int) -> None:
    inputs = make_inputs(Case(""), torch.float64, "cpu", seed)
    assert under_autocast("reference", "cpu")(inputs.query, inputs.key, inputs.value)[0].dtype == torch.float64


@pytest.mark.parametrize(("backend", "device"), [REFERENCE, *CPU])
def test_gradients_only_where_they_are_asked_for(backend: str, device: str, seed: int) -> None:
    inputs = make_inputs(Case("", mask="float 1HLS", key_mask="float", sinks=True), torch.float32, device, seed)
    everything = results(fused(backend), inputs)
    _check_each_alone(inputs, everything, backend)


@interpreted
def test_kernels_give_each_gradient_alone(seed: int) -> None:
    """pytorch#148476: an illegal access when the mask alone requires a gradient."""
    inputs = make_inputs(Case("", batch=1, mask="float 1HLS", key_mask="float", sinks=True), torch.float32, "cpu", seed)
    _check_each_alone(inputs, results(fused("triton"), inputs), "triton")


def _check_each_alone(inputs: Inputs, everything: dict[str, Tensor], backend: str) -> None:
    for name in ("query", "key", "value", "attn_mask", "key_mask", "sinks"):
        if name in ("query", "key", "value"):
            leaf = getattr(inputs, name).detach().requires_grad_()
            alone = replace(inputs, **{name: leaf})
        else:
            leaf = inputs.options[name].detach().requires_grad_()
            alone = replace(inputs, options=inputs.options | {name: leaf})
        out, lse = fused(backend)(alone.query, alone.key, alone.value, **alone.options)
        sent = [(out, inputs.grad_out)] + ([(lse, inputs.grad_lse)] if lse.requires_grad else [])
        (grad,) = torch.autograd.grad([x for x, _ in sent], leaf, [grad for _, grad in sent])
        assert_equal_bits(grad, everything[f"grad {name}"], name)


@every_backend
def test_the_same_tensor_three_times(backend: str, device: str, seed: int) -> None:
    x = torch.randn(2, 2, 9, 8, device=device)
    inputs = Inputs(x, x, x, torch.randn_like(x), torch.randn(2, 2, 9, device=device), {"is_causal": True})
    assert_results_within_contract(results(fused(backend), inputs, with_lse=backend != "torch"), inputs)
    shared = x.clone().requires_grad_()
    out = attention(shared, shared, shared, is_causal=True, backend=backend)
    (grad,) = torch.autograd.grad(out, shared, inputs.grad_out)
    apart = results(fused(backend), replace(inputs, grad_lse=torch.zeros_like(inputs.grad_lse)), with_lse=False)
    torch.testing.assert_close(grad, apart["grad query"] + apart["grad key"] + apart["grad value"])

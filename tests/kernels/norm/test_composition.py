"""Composes with torch: derivatives of any order, function transforms, checkpointing, autocast, compile and export."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from fusedformer.functional import dropout_add_layer_norm, dropout_add_rms_norm
from tests.kernels.norm.cases import NORMS, Case, Inputs, make_inputs
from tests.kernels.norm.eager import eager, fused, results
from tests.lanes import built, every_backend, every_feature, every_kernel, interpreted
from tests.operators import Calls, Counter
from tests.tolerances import assert_equal_bits, assert_no_mistake

CPP = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def inputs_for(backend: str, device: str, seed: int, norm: str = "layer_norm", **changes: Any) -> Inputs:
    case = Case("", shape=(3, 2, 9), norm=norm, dropout_p=0.0 if backend == "torch" else 0.3)
    return make_inputs(replace(case, **changes), torch.float32, device, seed)


@pytest.mark.parametrize(
    "case",
    [
        Case("", shape=(2, 3, 5), dropout_p=0.3),
        Case("", shape=(2, 3, 5), norm="rms_norm"),
        Case("", shape=(4, 5), residual="", parameters="b"),
    ],
    ids=str,
)
def test_gradcheck_of_the_reference(case: Case, seed: int) -> None:
    inputs = make_inputs(case, torch.float32, "cpu", seed).to(torch.float64)
    leaves = inputs.leaves()

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return fused(inputs, "reference")(**dict(zip(leaves, tensors, strict=True)))

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))
    assert torch.autograd.gradgradcheck(function, tuple(leaves.values()))


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=built), pytest.param("triton", marks=interpreted)])
@pytest.mark.parametrize(
    "case",
    [
        Case("", dropout_p=0.3),
        Case("", norm="rms_norm", residual="float32"),
        Case("", residual="", parameters="w"),
        Case("", layout="transposed", parameters="float32 wb"),
    ],
    ids=str,
)  # fmt: skip
def test_opcheck(case: Case, backend: str, seed: int) -> None:
    inputs = make_inputs(case, torch.float16, "cpu", seed)
    with Calls() as calls:
        results(fused(inputs, backend), inputs)
    assert calls.made.keys() == {"norm_forward", "norm_backward"}
    for func, args in calls.made.values():
        torch.library.opcheck(func, tuple(x.detach() if isinstance(x, Tensor) else x for x in args))


def second_order(inputs: Inputs, function: Callable[..., tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """The gradient of a random combination of the first gradients, and of the gradients sent in."""
    leaves = inputs.leaves()
    sent = {name: getattr(inputs, name).detach().requires_grad_() for name in ("grad_out", "grad_sum")}
    first = torch.autograd.grad(function(**leaves), list(leaves.values()), list(sent.values()), create_graph=True)
    generator = torch.Generator().manual_seed(0)
    terms = [(grad * torch.randn(grad.shape, generator=generator).to(grad)).sum() for grad in first]
    named = leaves | sent
    second = torch.autograd.grad(terms, list(named.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(named, second, strict=True))


@every_backend
@pytest.mark.parametrize("residual", ["", "same"])
@pytest.mark.parametrize("norm", NORMS)
def test_double_backward(norm: str, residual: str, backend: str, device: str, seed: int) -> None:
    inputs = inputs_for(backend, device, seed, norm, residual=residual)
    if not residual and backend == "torch":
        inputs = replace(inputs, grad_sum=torch.zeros_like(inputs.grad_sum))
    wide = inputs.to(torch.float64)
    truth = second_order(wide, eager(wide))
    for name, x in second_order(inputs, fused(inputs, backend)).items():
        assert_no_mistake(x, truth[name], name)


@every_backend
@pytest.mark.parametrize("norm", NORMS)
def test_func_grad(norm: str, backend: str, device: str, seed: int) -> None:
    inputs = inputs_for(backend, device, seed, norm)
    names = tuple(inputs.tensors)

    def loss(*tensors: Tensor) -> Tensor:
        out, total = fused(inputs, backend)(**dict(zip(names, tensors, strict=True)))
        return (out * inputs.grad_out).sum() + (total * inputs.grad_sum).sum()

    transformed = torch.func.grad(loss, argnums=tuple(range(len(names))))(*inputs.tensors.values())
    actual = results(fused(inputs, backend), inputs)
    for name, x in zip(names, transformed, strict=True):
        torch.testing.assert_close(x, actual[f"grad {name}"])


IN_DIMS = {
    "input alone": (0, None, None, None),
    "all": (0, 0, 0, 0),
    "elsewhere": (1, 2, None, None),
    "weight alone": (None, None, 1, None),
}


def vmapped(function: Callable[..., Tensor], in_dims: tuple[Any, ...], *tensors: Tensor) -> tuple[Tensor, Tensor]:
    """``function`` under vmap, and over a loop."""
    loop = [
        function(*(x if dim is None else x.select(dim, i) for x, dim in zip(tensors, in_dims, strict=True)))
        for i in range(2)
    ]
    return torch.func.vmap(function, in_dims=in_dims)(*tensors), torch.stack(loop)


@every_backend
@pytest.mark.parametrize("argnums", [(), (0, 1), (0, 1, 2, 3)], ids=["forward", "gradient of rows", "gradient"])
@pytest.mark.parametrize("in_dims", IN_DIMS)
def test_vmap(in_dims: str, argnums: tuple[int, ...], backend: str, device: str) -> None:
    dims = IN_DIMS[in_dims]
    shapes = [(3, 5, 8), (3, 5, 8), (8,), (8,)]
    tensors = [
        torch.randn(shape if dim is None else (*shape[:dim], 2, *shape[dim:]), device=device)
        for dim, shape in zip(dims, shapes, strict=True)
    ]
    factor = torch.randn(2, 3, 5, 8, device=device)

    def function(*given: Tensor) -> Tensor:
        return torch.stack(dropout_add_layer_norm(*given, return_sum=True, backend=backend))

    def gradients(*given: Tensor) -> Tensor:
        grads = torch.func.grad(lambda *x: (function(*x) * factor).sum(), argnums=argnums)(*given)
        return torch.cat([grad.flatten() for grad in grads])

    actual, expected = vmapped(gradients if argnums else function, dims, *tensors)
    torch.testing.assert_close(actual, expected)


@every_feature
@pytest.mark.parametrize("seeds", ["shared", "own"])
def test_vmap_with_dropout_is_the_loop(seeds: str, backend: str, device: str) -> None:
    x, factor = torch.randn(2, 5, 8, device=device), torch.randn(5, 8, device=device)
    seed = torch.randint(0, 99, (2,) if seeds == "shared" else (2, 2), device=device)
    function = lambda x, seed: dropout_add_rms_norm(x, x, None, dropout_p=0.5, seed=seed, backend=backend)
    dims = (0, None if seeds == "shared" else 0)
    actual, expected = vmapped(function, dims, x, seed)
    assert_equal_bits(actual, expected)
    gradient = torch.func.grad(lambda x, seed: (function(x, seed) * factor).sum())
    torch.testing.assert_close(*vmapped(gradient, dims, x, seed))


@every_backend
@pytest.mark.parametrize("norm", NORMS)
def test_jacrev(norm: str, backend: str, device: str, seed: int) -> None:
    inputs = inputs_for(backend, device, seed, norm)

    def through(chosen: str) -> Tensor:
        rest = {name: x for name, x in inputs.tensors.items() if name != "weight"}
        jacobian: Tensor = torch.func.jacrev(lambda weight: fused(inputs, chosen)(weight=weight, **rest)[0][0, 1])(
            inputs.tensors["weight"]
        )
        return jacobian

    assert_no_mistake(through(backend), through("reference"))


@every_kernel
def test_forward_mode_is_refused(backend: str, device: str) -> None:
    """Without a formula for it the tangents would be lost in silence."""
    x, tangent = torch.randn(5, 8, device=device), torch.randn(5, 8, device=device)
    function = partial(dropout_add_rms_norm, residual=x, weight=None, backend=backend)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        function(forward_ad.make_dual(x, tangent))
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(function, (x,), (tangent,))


@every_backend
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_draws_the_same_dropout_again(use_reentrant: bool, backend: str, device: str, seed: int) -> None:
    inputs = inputs_for(backend, device, seed)

    def gradients(run: Callable[..., Tensor]) -> list[Tensor]:
        leaves = inputs.leaves()
        torch.manual_seed(seed)
        out = run(*leaves.values())
        out.backward(inputs.grad_out)  # the reentrant form knows no torch.autograd.grad
        return [out.detach(), *(x.grad for x in leaves.values() if x.grad is not None)]

    plain = partial(dropout_add_layer_norm, dropout_p=0.4, backend=backend)
    expected = gradients(plain)
    actual = gradients(partial(checkpoint, plain, use_reentrant=use_reentrant))
    assert len(actual) == len(expected) == 5
    for one, other in zip(actual, expected, strict=True):
        assert_equal_bits(one, other)


@every_backend
@pytest.mark.parametrize("alone", ["input", "residual", "weight", "bias"])
def test_gradients_only_where_they_are_asked_for(alone: str, backend: str, device: str, seed: int) -> None:
    inputs = inputs_for(backend, device, seed, shape=(40, 9))
    everything = results(fused(inputs, backend), inputs)
    leaf = inputs.tensors[alone].detach().requires_grad_()
    out, total = fused(inputs, backend)(**inputs.tensors | {alone: leaf})
    sent = [(out, inputs.grad_out)] + (
        [(total, inputs.grad_sum)] if total.requires_grad and alone in ("input", "residual") else []
    )
    (grad,) = torch.autograd.grad([x for x, _ in sent], leaf, [grad for _, grad in sent])
    assert_equal_bits(grad, everything[f"grad {alone}"], alone)


@every_backend
def test_the_same_tensor_twice(backend: str, device: str, seed: int) -> None:
    inputs = inputs_for(backend, device, seed)
    tensors = inputs.tensors | {"residual": inputs.tensors["input"]}
    apart = results(fused(inputs, backend), replace(inputs, tensors=tensors))
    leaf = inputs.tensors["input"].detach().requires_grad_()
    outputs = fused(inputs, backend)(**tensors | {"input": leaf, "residual": leaf})
    (grad,) = torch.autograd.grad(outputs, leaf, (inputs.grad_out, inputs.grad_sum))
    torch.testing.assert_close(grad, apart["grad input"] + apart["grad residual"])


@every_backend
@pytest.mark.parametrize("residual", ["float32", "same"])
def test_autocast(residual: str, backend: str, device: str, seed: int) -> None:
    """On the CPU it leaves norms alone, as torch's own; on GPUs they are float32."""
    inputs = make_inputs(Case("", residual=residual, parameters="float32 wb"), torch.bfloat16, device, seed)
    if backend == "triton" and device == "cpu":
        inputs = make_inputs(Case("", residual=residual, parameters="float32 wb"), torch.float16, device, seed)
    with torch.autocast(device, dtype=torch.bfloat16):
        inside = fused(inputs, backend)(**inputs.tensors)
        torchs = torch.nn.functional.layer_norm(
            inputs.tensors["residual"] + inputs.tensors["input"],
            (40,),
            inputs.tensors["weight"],
            inputs.tensors["bias"],
        )
    assert inside[0].dtype == torchs.dtype
    if device == "cpu":
        for one, other in zip(inside, fused(inputs, backend)(**inputs.tensors), strict=True):
            assert_equal_bits(one, other)


def both(compiled: Callable[..., Any], plain: Callable[..., Any], inputs: Inputs) -> None:
    expected = results(plain, inputs)
    for name, x in results(compiled, inputs).items():
        torch.testing.assert_close(x, expected[name], msg=partial("{}: {}".format, name))


@every_backend
@pytest.mark.parametrize("norm", NORMS)
def test_one_graph_forward_and_backward(norm: str, backend: str, device: str, seed: int) -> None:
    counter = Counter()
    inputs = inputs_for(backend, device, seed, norm)
    both(torch.compile(fused(inputs, backend), backend=counter, fullgraph=True), fused(inputs, backend), inputs)
    assert len(counter.graphs) == 1


@every_backend
def test_dynamic_shapes_compile_once(backend: str, device: str, seed: int) -> None:
    def function(input: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return dropout_add_layer_norm(input, residual, weight, bias, return_sum=True, backend=backend)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shape in ((3, 5, 40), (4, 7, 24), (2, 9, 33)):
            both(compiled, function, inputs_for(backend, device, seed, shape=shape, dropout_p=0.0))


@pytest.mark.skipif(CPP is None, reason="inductor needs a C++ compiler")
@every_backend
def test_inductor(backend: str, device: str, seed: int) -> None:
    """With work before and after, so that what we say about strides is put to use."""
    weight = torch.randn(16, 16, device=device) / 4

    def block(x: Tensor) -> Tensor:
        out, total = dropout_add_layer_norm(
            (x @ weight).transpose(0, 1), x.transpose(0, 1), weight[0], None, return_sum=True, backend=backend
        )
        return torch.relu(out @ weight) + total

    x = torch.randn(2, 9, 16, device=device)
    found = []
    for function in (block, torch.compile(block, fullgraph=True)):
        leaf = x.clone().requires_grad_()
        out = function(leaf)
        found.append((out, *torch.autograd.grad(out.square().sum(), leaf)))
    for one, other in zip(*found, strict=True):
        assert_no_mistake(one, other.double())


def test_the_same_tensor_in_one_graph() -> None:
    x, vector = torch.randn(5, 16, requires_grad=True), torch.randn(16)
    function = lambda x: dropout_add_layer_norm(x, x, vector, vector)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    found = [torch.autograd.grad(f(x).square().sum(), x)[0] for f in (function, compiled)]
    torch.testing.assert_close(found[0], found[1])


class Normalise(torch.nn.Module):
    def __init__(self, backend: str) -> None:
        super().__init__()
        self.weight = torch.nn.Buffer(torch.randn(16))
        self.backend = backend

    def forward(self, input: Tensor, residual: Tensor) -> Tensor:
        return dropout_add_rms_norm(input, residual, self.weight, backend=self.backend)


@every_backend
@pytest.mark.parametrize("strict", [False, True])
def test_export_with_dynamic_shapes(strict: bool, backend: str, device: str) -> None:
    module = Normalise(backend).to(device)
    given = (torch.randn(3, 5, 16, device=device), torch.randn(3, 5, 16, device=device))
    dims = {0: torch.export.Dim("batch", min=2, max=64), 1: torch.export.Dim("tokens", min=2, max=64)}
    program = torch.export.export(module, given, dynamic_shapes={"input": dims, "residual": dims}, strict=strict)
    other = (torch.randn(4, 7, 16, device=device), torch.randn(4, 7, 16, device=device))
    for tensors in (given, other):
        torch.testing.assert_close(program.module()(*tensors), module(*tensors))
    if backend in ("cpu", "triton"):
        assert "fusedformer.norm_forward" in str(program.graph)

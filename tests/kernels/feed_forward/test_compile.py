"""The feed-forward network under torch.compile, always one graph, and torch.export: forward, backward and dynamic
shapes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedformer import use_backend
from fusedformer.functional import feed_forward
from tests.kernels.feed_forward.cases import Case, Inputs, make_inputs
from tests.kernels.feed_forward.eager import call, fused, results
from tests.lanes import each_backend, each_feature, each_kernel
from tests.operators import Counter
from tests.tolerances import assert_no_mistake

CPP = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
MIXED = Case(
    "mixed", leading=(2, 3), d_in=8, d_ff=12, d_out=5, gated=True, activation="gelu", residual=True, dropout_p=0.3,
    residual_dropout_p=0.2,
)  # fmt: skip
PLAIN = replace(MIXED, dropout_p=0.0, residual_dropout_p=0.0)


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def inputs_for(backend: str, device: str, seed: int, **sizes: Any) -> Inputs:
    return make_inputs(replace(PLAIN if backend == "torch" else MIXED, **sizes), torch.float32, device, seed)


def both(compiled: Callable[..., Any], plain: Callable[..., Any], inputs: Inputs) -> None:
    expected = results(plain, inputs)
    for name, x in results(compiled, inputs).items():
        assert_no_mistake(x, expected[name], name)


@each_backend
@pytest.mark.parametrize("recompute", [False, True])
def test_one_graph_forward_and_backward(recompute: bool, backend: str, device: str, seed: int) -> None:
    counter = Counter()
    compiled = torch.compile(fused(backend), backend=counter, fullgraph=True)
    both(compiled, fused(backend), inputs_for(backend, device, seed, recompute=recompute))
    assert len(counter.graphs) == 1


@each_backend
def test_dynamic_shapes_compile_once(backend: str, device: str, seed: int) -> None:
    compiled = torch.compile(fused(backend), backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for leading in ((2, 3), (4, 7), (3, 5)):
            inputs = make_inputs(replace(PLAIN, leading=leading), torch.float32, device, seed)
            both(compiled, fused(backend), inputs)


@pytest.mark.skipif(CPP is None, reason="inductor needs a C++ compiler")
@each_backend
def test_inductor(backend: str, device: str) -> None:
    """With work before and after, so that what we say about strides is put to use; the residual is the input."""
    weight1, weight2 = torch.randn(12, 8, device=device), torch.randn(8, 12, device=device)

    def block(x: Tensor) -> Tensor:
        x = (x + 1.0).transpose(0, 1)
        out = feed_forward(x, weight1, weight2, activation="silu", residual=x, backend=backend)
        return torch.relu(out.transpose(0, 1) * 2.0)

    x = torch.randn(3, 5, 8, device=device)
    found = []
    for function in (block, torch.compile(block, fullgraph=True)):
        leaf = x.clone().requires_grad_()
        out = function(leaf)
        found.append((out, *torch.autograd.grad(out.square().sum(), leaf)))
    for one, other in zip(*found, strict=True):
        assert_no_mistake(one, other)


@each_feature
def test_dropout_without_a_seed_in_a_graph(backend: str, device: str) -> None:
    """The seed is drawn in the graph: as many masks as calls, and backward has forward's."""
    identity = torch.eye(8, device=device)
    function = lambda x: feed_forward(x, identity, identity, dropout_p=0.5, backend=backend)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    x = torch.ones(9, 8, device=device, requires_grad=True)
    first, second = compiled(x), compiled(x)
    assert not torch.equal(first, second)
    (grad,) = torch.autograd.grad(first, x, torch.ones_like(first))
    torch.testing.assert_close(grad, first.detach())


@pytest.mark.parametrize("activation", [torch.relu, torch.nn.functional.gelu, torch.tanh])
def test_a_callable_in_one_graph(activation: Callable[[Tensor], Tensor]) -> None:
    x, weight = torch.randn(5, 8), torch.randn(8, 8)
    function = lambda x: feed_forward(x, weight, weight, activation=activation)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), function(x))


def test_use_backend_is_guarded(seed: int) -> None:
    """A change of the scoped backend compiles anew rather than running the old choice."""
    counter = Counter()
    inputs = make_inputs(PLAIN, torch.float32, "cpu", seed)
    compiled = torch.compile(call, backend=counter, fullgraph=True)
    for backend in ("torch", "reference", "torch"):
        with use_backend(backend):
            compiled(**inputs.tensors, **inputs.options)
    by_torch, by_reference = counter.graphs
    assert "linear" in by_torch
    assert "linear" not in by_reference


@each_kernel
def test_a_transform_is_left_out_of_the_graph(backend: str, device: str) -> None:
    """Dynamo would inline the forward of an autograd function there, and the gradient would be 0."""
    x, weight = torch.randn(5, 8, device=device), torch.randn(8, 8, device=device)
    gradient = torch.func.grad(lambda x: feed_forward(x, weight, weight, activation="gelu", backend=backend).sum())
    torch.testing.assert_close(torch.compile(gradient, backend="aot_eager")(x), gradient(x))
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="loses the gradient of a transform"):
        torch.compile(gradient, backend="aot_eager", fullgraph=True)(x)


class Network(torch.nn.Module):
    def __init__(self, device: str, backend: str) -> None:
        super().__init__()
        self.linear1, self.linear2 = torch.nn.Linear(8, 12, device=device), torch.nn.Linear(12, 6, device=device)
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.linear1, self.linear2
        return feed_forward(x, one.weight, two.weight, one.bias, two.bias, activation="gelu", backend=self.backend)


@each_backend
@pytest.mark.parametrize("strict", [False, True])
def test_export_with_dynamic_shapes(strict: bool, backend: str, device: str) -> None:
    network = Network(device, backend)
    batch, length = (torch.export.Dim(name, min=2, max=64) for name in ("batch", "length"))
    x, other = torch.randn(2, 3, 8, device=device), torch.randn(4, 7, 8, device=device)
    program = torch.export.export(network, (x,), dynamic_shapes={"x": {0: batch, 1: length}}, strict=strict)
    for given in (x, other):
        torch.testing.assert_close(program.module()(given), network(given))
    if backend in ("cpu", "triton"):
        assert "fusedformer.feed_forward_forward" in program.graph_module.print_readable(print_output=False)

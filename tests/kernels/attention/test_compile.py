"""Attention under torch.compile, always one graph, and torch.export: forward, backward and dynamic shapes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedformer import use_backend
from fusedformer.functional import attention, attention_weights, scaled_dot_product_attention
from fusedformer.kernels.common.native import EXTENSION
from tests.cases import Case, Inputs, make_inputs
from tests.kernels.attention.eager import Results, call, fused, results
from tests.lanes import every_backend, every_feature
from tests.operators import Counter
from tests.tolerances import assert_no_mistake

CPP = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
MIXED = Case(
    "mixed", batch=1, heads=2, heads_kv=1, len_q=9, len_k=11, head_dim=16, value_dim=8, is_causal=True,
    causal_alignment="bottom_right", key_mask="bool", mask="float 1HLS", softcap=2.0, sinks=True, alibi="H",
    dropout_p=0.3, layout="BLHE",
)  # fmt: skip
FOR_TORCH = Case(
    "for torch", batch=1, heads=2, heads_kv=1, len_q=9, len_k=11, head_dim=16, is_causal=True, key_mask="bool"
)


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def inputs_for(backend: str, device: str, seed: int, **sizes: Any) -> Inputs:
    return make_inputs(replace(FOR_TORCH if backend == "torch" else MIXED, **sizes), torch.float32, device, seed)


def both(compiled: Callable[..., Any], plain: Callable[..., Any], inputs: Inputs, with_lse: bool) -> None:
    expected: Results = results(plain, inputs, with_lse)
    for name, x in results(compiled, inputs, with_lse).items():
        torch.testing.assert_close(x, expected[name], msg=partial("{}: {}".format, name))


@every_backend
def test_one_graph_forward_and_backward(backend: str, device: str, seed: int) -> None:
    counter = Counter()
    compiled = torch.compile(fused(backend), backend=counter, fullgraph=True)
    both(compiled, fused(backend), inputs_for(backend, device, seed), with_lse=backend != "torch")
    assert len(counter.graphs) == 1


@every_backend
def test_dynamic_shapes_compile_once(backend: str, device: str, seed: int) -> None:
    compiled = torch.compile(fused(backend), backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, len_q, len_k in (
            (3, 9, 11),
            (4, 7, 13),
            (3, 5, 33),
        ):  # no two sizes alike: Dynamo takes equals for one
            inputs = inputs_for(backend, device, seed, batch=batch, len_q=len_q, len_k=len_k)
            inputs.options["dropout_p"] = 0.0  # a hundred operations of Philox, each with its symbols, take their time
            both(compiled, fused(backend), inputs, with_lse=backend != "torch")


@pytest.mark.skipif(CPP is None, reason="inductor needs a C++ compiler")
@every_backend
def test_inductor(backend: str, device: str, seed: int) -> None:
    """With work before and after, so that what we say about strides is put to use."""
    weight = torch.randn(16, 16, device=device) / 4

    def block(x: Tensor) -> Tensor:
        query, key, value = ((x @ weight + i).unflatten(-1, (2, 8)).transpose(1, 2) for i in range(3))
        out = attention(query, key, value, is_causal=True, backend=backend)
        return torch.relu(out.transpose(1, 2).flatten(2) @ weight)

    x = torch.randn(2, 9, 16, device=device)
    found = []
    for function in (block, torch.compile(block, fullgraph=True)):
        leaf = x.clone().requires_grad_()
        out = function(leaf)
        found.append((out, *torch.autograd.grad(out.square().sum(), leaf)))
    for one, other in zip(*found, strict=True):
        assert_no_mistake(one, other)


def test_dropout_without_a_seed_in_a_graph() -> None:
    """The seed is drawn in the graph: as many masks as calls, and backward has forward's."""
    query, value = (
        torch.zeros(2, 2, 9, 16, requires_grad=True),
        torch.eye(16).expand(2, 2, 16, 16).clone().requires_grad_(),
    )
    key = torch.zeros(2, 2, 16, 16)
    function = lambda q, k, v: attention(q, k, v, dropout_p=0.5, backend="reference")
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    first, second = compiled(query, key, value), compiled(query, key, value)
    assert not torch.equal(first, second)
    (grad,) = torch.autograd.grad(first, value, torch.ones_like(first))
    torch.testing.assert_close(grad, first.detach().sum(2)[..., None].expand_as(grad))


@every_feature
@pytest.mark.parametrize("average_heads", [True, False])
def test_weights_in_one_graph(average_heads: bool, backend: str, device: str, seed: int) -> None:
    inputs = inputs_for(backend, device, seed)
    options = {name: x for name, x in inputs.options.items() if name != "sinks"}

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        _, lse = attention(query, key, value, **inputs.options, return_lse=True, backend=backend)
        return attention_weights(query, key, lse, **options, average_heads=average_heads, backend=backend)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    tensors = (inputs.query, inputs.key, inputs.value)
    torch.testing.assert_close(compiled(*tensors), function(*tensors))


def test_use_backend_is_guarded(seed: int) -> None:
    """A change of the scoped backend compiles anew rather than running the old choice."""
    counter = Counter()
    inputs = make_inputs(Case("", len_q=5, head_dim=16), torch.float32, "cpu", seed)
    tensors = (inputs.query, inputs.key, inputs.value)
    compiled = torch.compile(call, backend=counter, fullgraph=True)
    for backend in ("torch", "reference", "torch", "auto"):
        with use_backend(backend):
            compiled(*tensors)
    by_torch, by_reference, *by_auto = counter.graphs
    assert "scaled_dot_product_attention" in by_torch
    assert "scaled_dot_product_attention" not in by_reference
    assert "exp" in by_reference
    (graph,) = by_auto
    assert ("attention_forward" if EXTENSION.path else "scaled_dot_product_attention") in graph


def test_use_backend_inside_a_graph(seed: int) -> None:
    inputs = make_inputs(Case("", len_q=5, head_dim=16), torch.float32, "cpu", seed)

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with use_backend("reference"):
            return attention(query, key, value)

    counter = Counter()
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    torch.testing.assert_close(
        compiled(inputs.query, inputs.key, inputs.value), function(inputs.query, inputs.key, inputs.value)
    )
    assert "scaled_dot_product_attention" not in counter.graphs[0]


def test_the_same_tensor_in_one_graph() -> None:
    x = torch.randn(2, 2, 9, 16, requires_grad=True)
    function = lambda x: attention(x, x, x, is_causal=True)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    found = [torch.autograd.grad(f(x).square().sum(), x)[0] for f in (function, compiled)]
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("shape", [(9, 16), (2, 9, 16), (2, 2, 9, 16), (3, 2, 2, 9, 16)], ids=str)
def test_sdpa_in_one_graph(shape: tuple[int, ...]) -> None:
    x, mask = torch.randn(shape), torch.randn(shape[-2], shape[-2])
    compiled = torch.compile(scaled_dot_product_attention, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, x, x, mask), torch.nn.functional.scaled_dot_product_attention(x, x, x, mask))


class Attend(torch.nn.Module):
    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.options = options

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out: Tensor = call(query, key, value, **self.options)
        return out


@every_backend
@pytest.mark.parametrize("strict", [False, True])
def test_export_with_dynamic_shapes(strict: bool, backend: str, device: str, seed: int) -> None:
    options = {"is_causal": True, "enable_gqa": True, "backend": backend}
    tensors = [torch.randn(2, heads, n, 16, device=device) for heads, n in ((4, 9), (2, 11), (2, 11))]
    batch, len_q, len_k = (torch.export.Dim(name, min=2, max=64) for name in ("batch", "len_q", "len_k"))
    shapes = {"query": {0: batch, 2: len_q}, "key": {0: batch, 2: len_k}, "value": {0: batch, 2: len_k}}
    program = torch.export.export(Attend(options), tuple(tensors), dynamic_shapes=shapes, strict=strict)
    other = [torch.randn(3, heads, n, 16, device=device) for heads, n in ((4, 17), (2, 5), (2, 5))]
    for given in (tensors, other):
        torch.testing.assert_close(program.module()(*given), call(*given, **options))
    if backend in ("cpu", "triton"):
        assert "fusedformer.attention_forward" in str(program.graph)

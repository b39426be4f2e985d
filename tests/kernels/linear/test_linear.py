"""The linear layer on every backend: the contract, arguments, and composition with torch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fusedformer
from fusedformer import BackendRefused
from fusedformer.functional import linear
from tests.lanes import CPU, REFERENCE, TORCH, TRITON, built, each_backend, each_feature, each_kernel, every_backend
from tests.operators import Calls
from tests.tolerances import assert_equal_bits, assert_no_mistake, assert_within_contract

ATTEMPTS = {torch.float32: 12}
# (leading), in_features, out_features
SHAPES = {
    "one row": ((1,), 64, 33),
    "one each": ((1,), 1, 1),
    "odd": ((17,), 33, 65),
    "projection": ((2, 9), 32, 96),
    "many rows": ((65,), 24, 17),
    "deep": ((5,), 129, 8),
}
Given = dict[str, Tensor]
call: Callable[..., Tensor] = linear  # its signature does not take dicts of arguments apart


def make(
    shape: str, dtype: torch.dtype, device: str, seed: int, bias: bool = True, layout: str = "contiguous"
) -> tuple[Given, Tensor]:
    """The arguments, and a gradient for the result."""
    generator = torch.Generator().manual_seed(seed)
    leading, features, out_features = SHAPES[shape]

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(device, dtype)

    given = {"input": draw(*leading, features), "weight": draw(out_features, features) / features**0.5}
    if layout == "rows":
        wide = draw(*leading, features + 8).fill_(float("nan"))
        given["input"] = wide[..., :features].copy_(given["input"])
    if layout == "last stride":
        given = {name: x.mT.contiguous().mT for name, x in given.items()}
    if bias:
        given["bias"] = draw(out_features)
    return given, draw(*leading, out_features)


def results(function: Callable[..., Tensor], given: Given, grad_out: Tensor) -> Given:
    leaves = {name: x.detach().requires_grad_() for name, x in given.items()}
    out = function(**leaves)
    grads = torch.autograd.grad(out, list(leaves.values()), grad_out)
    return {"out": out.detach()} | {f"grad {name}": x for name, x in zip(leaves, grads, strict=True)}


def eager(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, attempt: int = 0) -> Tensor:
    """``attempt`` changes the order of every sum."""
    if attempt == 0:
        return F.linear(input, weight, bias)
    rows = input.reshape(-1, input.size(-1))
    tokens, features = (torch.randperm(size).to(input.device) for size in rows.shape)
    out = F.linear(rows[tokens][:, features], weight[:, features], bias)
    return out[tokens.argsort()].view(*input.shape[:-1], -1)


def takes(lane: Any, dtype: torch.dtype) -> bool:
    # The interpreter computes products of bfloat16 wrongly.
    return not (lane.values == ("triton", "cpu") and dtype == torch.bfloat16)


@pytest.mark.parametrize(
    ("backend", "device", "dtype"),
    [
        pytest.param(*lane.values, dtype, id=f"{lane.id}-{str(dtype)[6:]}", marks=lane.marks)
        for lane in (REFERENCE, TORCH, *CPU, *TRITON)
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
        if takes(lane, dtype)
    ],
)
@pytest.mark.parametrize(
    ("shape", "bias", "layout"),
    [
        *((shape, True, "contiguous") for shape in SHAPES),
        ("odd", False, "contiguous"),
        ("projection", True, "rows"),
        ("odd", False, "last stride"),
    ],
)
def test_within_the_contract(
    shape: str, bias: bool, layout: str, dtype: torch.dtype, backend: str, device: str, seed: int
) -> None:
    given, grad_out = make(shape, dtype, device, seed, bias, layout)
    actual = results(partial(linear, backend=backend), given, grad_out)
    truth = results(eager, {name: x.double() for name, x in given.items()}, grad_out.double())
    attempts = [results(partial(eager, attempt=attempt), given, grad_out) for attempt in range(ATTEMPTS.get(dtype, 2))]
    assert actual.keys() == truth.keys()
    for name, x in actual.items():
        assert_within_contract(x, truth[name], [attempt[name] for attempt in attempts], name)


# ---- the rest of the contract


@every_backend
def test_same_bits_twice_and_nothing_given_is_written(backend: str, device: str, seed: int) -> None:
    given, grad_out = make("projection", torch.float32, device, seed)
    leaves = {name: x.requires_grad_() for name, x in given.items()}
    tensors = [*leaves.values(), grad_out]
    before, versions = [x.detach().clone() for x in tensors], [x._version for x in tensors]
    out, again = (call(**leaves, backend=backend) for _ in range(2))
    assert_equal_bits(out.detach(), again.detach())
    wanted = list(leaves.values())
    first = torch.autograd.grad(out, wanted, grad_out, retain_graph=True)
    for one, two in zip(first, torch.autograd.grad(out, wanted, grad_out), strict=True):
        assert_equal_bits(two, one)
    for x, copy, version in zip(tensors, before, versions, strict=True):
        assert x._version == version
        assert torch.equal(x, copy)


@every_backend
@pytest.mark.parametrize("leading", [(), (0,), (4,), (2, 0), (2, 1, 3)], ids=str)
def test_any_leading_dimensions(leading: tuple[int, ...], backend: str, device: str) -> None:
    given = {"input": torch.randn(*leading, 8), "weight": torch.randn(6, 8), "bias": torch.randn(6)}
    given = {name: x.to(device) for name, x in given.items()}
    grad_out = torch.randn(*leading, 6, device=device)
    expected = results(F.linear, given, grad_out)
    actual = results(partial(linear, backend=backend), given, grad_out)
    assert actual["out"].is_contiguous()
    for name, x in actual.items():
        assert_no_mistake(x, expected[name], name)


@every_backend
def test_gradients_only_where_they_are_asked_for(backend: str, device: str, seed: int) -> None:
    given, grad_out = make("odd", torch.float32, device, seed)
    everything = results(partial(linear, backend=backend), given, grad_out)
    for name, x in given.items():
        leaf = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(call(**given | {name: leaf}, backend=backend), leaf, grad_out)
        assert_equal_bits(grad, everything[f"grad {name}"], name)


@every_backend
def test_a_gradient_of_any_strides(backend: str, device: str, seed: int) -> None:
    given, dense = make("odd", torch.float32, device, seed)
    for grad_out in (torch.ones(1, device=device).expand_as(dense), dense.mT.contiguous().mT):
        expected = results(partial(linear, backend=backend), given, grad_out.contiguous())
        for name, x in results(partial(linear, backend=backend), given, grad_out).items():
            assert_no_mistake(x, expected[name], name)


# ---- arguments

BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"input": 1.0}, TypeError, "input: got float, expected a Tensor"),
    ({"weight": None}, TypeError, "weight: got NoneType, expected a Tensor"),
    ({"input": torch.randn(5, 8).to_sparse()}, TypeError, "input: got a nested or sparse tensor, expected"),
    ({"weight": torch.randn(6, 8, device="meta")}, ValueError, "weight: got a tensor on meta, expected cpu"),
    ({"input": torch.ones(5, 8, dtype=torch.int32)}, TypeError, "input: got int32, expected one of float32"),
    ({"weight": torch.randn(6, 8).half()}, TypeError, "weight: got float16, expected float32"),
    ({"bias": torch.randn(6).double()}, TypeError, "bias: got float64, expected float32"),
    ({"input": torch.tensor(1.0)}, ValueError, r"input: got shape \(\), expected \(..., features\)"),
    ({"weight": torch.randn(8)}, ValueError, r"weight: got .*, expected .* = \(out_features, 8\), of at least 1"),
    ({"weight": torch.randn(8, 6)}, ValueError, r"weight: got shape \(8, 6\), expected .* = \(out_features, 8\)"),
    ({"weight": torch.randn(0, 8)}, ValueError, r"weight: got shape \(0, 8\), expected .*, of at least 1"),
    ({"bias": torch.randn(1)}, ValueError, r"bias: got shape \(1,\), expected \(out_features\) = \(6\)$"),
    ({"precision": "half"}, ValueError, "precision: got 'half', expected one of"),
    ({"backend": "mkl"}, ValueError, "backend: got 'mkl', expected one of"),
]


@pytest.mark.parametrize(("bad", "error", "message"), BAD, ids=[message.split(",")[0] for _, _, message in BAD])
def test_a_bad_argument_is_named(bad: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {"input": torch.randn(5, 8), "weight": torch.randn(6, 8)}
    with pytest.raises(error, match=f"^{message}"):
        call(**given | bad)


def test_it_takes_what_torchs_takes() -> None:
    assert list(inspect.signature(linear).parameters) == ["input", "weight", "bias", "precision", "backend"]
    x, weight, bias = torch.randn(5, 8), torch.randn(6, 8), torch.randn(6)
    torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias))


def test_which_backend() -> None:
    x, weight = torch.randn(5, 8), torch.randn(6, 8)
    explanation = fusedformer.explain(linear, x, weight, precision="ieee")
    (decision,) = explanation.decisions
    assert decision.operation == "linear"
    assert decision.problem == "input (5, 8), weight (6, 8), float32, cpu, precision ieee"
    assert decision.refusals["torch"] == ["torch's products follow its own fp32 setting, a precision was given"]
    assert fusedformer.explain(linear, x.double(), weight.double()).backend == "torch"


@built
def test_the_native_kernels_run() -> None:
    explanation = fusedformer.explain(linear, torch.randn(5, 8), torch.randn(6, 8), backend="cpu")
    assert explanation.backend == "cpu"
    assert "instruction set level" in str(explanation)


@each_kernel
def test_kernels_refuse_float64(backend: str, device: str) -> None:
    x = torch.randn(5, 8, device=device, dtype=torch.float64)
    with pytest.raises(BackendRefused, match="float64"):
        linear(x, x, backend=backend)


# ---- composition


@each_kernel
@pytest.mark.parametrize(("bias", "layout"), [(True, "contiguous"), (False, "rows")])
def test_opcheck(bias: bool, layout: str, backend: str, device: str, seed: int) -> None:
    given, grad_out = make("projection", torch.float32, device, seed, bias, layout)
    with Calls() as calls:
        results(partial(linear, backend=backend), given, grad_out)
    assert calls.made.keys() == {"linear_forward", "linear_backward"}
    for func, args in calls.made.values():
        torch.library.opcheck(func, tuple(x.detach() if isinstance(x, Tensor) else x for x in args))


@each_backend
@pytest.mark.parametrize("wanted", [(), (0,), (0, 1, 2)], ids=["forward", "gradient of input", "all gradients"])
@pytest.mark.parametrize("dims", [(0, None, None), (1, None, None), (None, 0, None), (2, 1, 0), (None, None, 0)])
def test_vmap(dims: tuple[int | None, ...], wanted: tuple[int, ...], backend: str, device: str) -> None:
    shapes = ((3, 8), (6, 8), (6,))
    tensors = [
        torch.randn(shape if dim is None else (*shape[:dim], 2, *shape[dim:]), device=device)
        for shape, dim in zip(shapes, dims, strict=True)
    ]
    weight = torch.randn(3, 6, device=device)

    def gradients(*given: Tensor) -> Tensor:
        loss = lambda *x: (linear(*x, backend=backend) * weight).square().sum()
        return torch.cat([grad.flatten() for grad in torch.func.grad(loss, argnums=wanted)(*given)])

    function = gradients if wanted else partial(linear, backend=backend)
    loop = [
        function(*(x if dim is None else x.select(dim, i) for x, dim in zip(tensors, dims, strict=True)))
        for i in range(2)
    ]
    assert_no_mistake(torch.func.vmap(function, in_dims=dims)(*tensors), torch.stack(loop))


@each_backend
def test_jacrev(backend: str, device: str) -> None:
    x, weight = torch.randn(3, 8, device=device), torch.randn(6, 8, device=device)
    jacobian = torch.func.jacrev(lambda x: linear(x, weight, backend=backend))(x)
    assert_no_mistake(jacobian, torch.func.jacrev(lambda x: F.linear(x, weight.double()))(x.double()))


@each_kernel
def test_forward_mode_is_refused(backend: str, device: str) -> None:
    x = torch.randn(3, 8, device=device)
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda x: linear(x, x, backend=backend), (x,), (x,))


@each_backend
def test_double_backward(backend: str, device: str, seed: int) -> None:
    given, grad_out = make("odd", torch.float32, device, seed)

    def second(function: Callable[..., Tensor], given: Given, grad_out: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in (*given.values(), grad_out)]
        first = torch.autograd.grad(function(*leaves[:3]), leaves[:3], leaves[3], create_graph=True)
        return list(torch.autograd.grad([x.square().sum() for x in first], leaves[:2] + leaves[3:]))

    actual = second(partial(linear, backend=backend), given, grad_out)
    truth = second(F.linear, {name: x.double() for name, x in given.items()}, grad_out.double())
    for x, exact in zip(actual, truth, strict=True):
        assert_no_mistake(x, exact)


def test_derivatives_of_the_reference() -> None:
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 4), (2, 4), (2,))]
    assert torch.autograd.gradcheck(partial(linear, backend="reference"), tensors)
    assert torch.autograd.gradgradcheck(partial(linear, backend="reference"), tensors)


@each_backend
def test_autocast(backend: str, device: str, seed: int) -> None:
    given, grad_out = make("odd", torch.float32, device, seed)

    def inside(**leaves: Tensor) -> Tensor:
        with torch.autocast(device, torch.float16):
            return call(**leaves, backend=backend)

    actual = results(inside, given, grad_out.half())
    half = {name: x.half() for name, x in given.items()}
    expected = results(partial(linear, backend=backend), half, grad_out.half())
    for name, x in actual.items():
        assert x.dtype == (torch.float16 if name == "out" else torch.float32)
        assert_equal_bits(x, expected[name].to(x.dtype), name)


@each_feature
def test_the_same_tensor_twice(backend: str, device: str) -> None:
    x = torch.randn(5, 8, device=device, requires_grad=True)
    grads = [torch.autograd.grad(f(x, x).square().sum(), x)[0] for f in (partial(linear, backend=backend), F.linear)]
    assert_no_mistake(grads[0], grads[1])


# ---- graphs


@pytest.fixture
def _nothing_compiled_before() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@each_backend
@pytest.mark.usefixtures("_nothing_compiled_before")
def test_one_graph_of_dynamic_shapes(backend: str, device: str) -> None:
    function = partial(linear, backend=backend)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    weight, bias = torch.randn(6, 8, device=device), torch.randn(6, device=device)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for leading in ((2, 3), (4, 7), (3, 5)):
            given = {"input": torch.randn(*leading, 8, device=device), "weight": weight, "bias": bias}
            grad_out = torch.randn(*leading, 6, device=device)
            expected = results(function, given, grad_out)
            for name, x in results(compiled, given, grad_out).items():
                assert_no_mistake(x, expected[name], name)


@each_backend
@pytest.mark.usefixtures("_nothing_compiled_before")
def test_export(backend: str, device: str) -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor) -> Tensor:
            return linear(x, weight, backend=backend)

    x, other = torch.randn(2, 3, 8, device=device), torch.randn(4, 7, 8, device=device)
    weight = torch.randn(6, 8, device=device)
    batch, length = (torch.export.Dim(name, min=2, max=64) for name in ("batch", "length"))
    program = torch.export.export(Layer(), (x, weight), dynamic_shapes={"x": {0: batch, 1: length}, "weight": None})
    for given in (x, other):
        torch.testing.assert_close(program.module()(given, weight), F.linear(given, weight))
    if backend in ("cpu", "triton"):
        assert "fusedformer.linear_forward" in str(program.graph)

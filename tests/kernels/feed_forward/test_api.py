"""Arguments: bad ones are named with what came and what was expected, before any work; leading dimensions, callables,
which backend takes what."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fusedformer
from fusedformer import BackendRefused
from fusedformer.functional import feed_forward
from fusedformer.kernels.common.backend import record_decisions
from tests.kernels.feed_forward.cases import Case, make_inputs
from tests.lanes import built, each_backend, each_kernel
from tests.tolerances import assert_equal_bits

T, D, FF, OUT = 5, 8, 12, 6


def tensors(**replaced: Any) -> dict[str, Any]:
    given = {"input": torch.randn(T, D), "weight1": torch.randn(FF, D), "weight2": torch.randn(OUT, FF)}
    return given | replaced


GATE = {"gate_weight": torch.randn(FF, D)}
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    # type and layout
    ({"input": [1.0]}, TypeError, "input: got list, expected a Tensor"),
    ({"weight1": None}, TypeError, "weight1: got NoneType, expected a Tensor"),
    ({"input": torch.randn(T, D).to_sparse()}, TypeError, "input: got a nested or sparse tensor, expected"),
    ({"input": torch.nested.nested_tensor([torch.randn(2, D)])}, TypeError, "input: got a nested or sparse tensor"),
    ({"weight2": torch.randn(OUT, FF).to_sparse_csr()}, TypeError, "weight2: got a nested or sparse tensor"),
    ({"weight1": torch.randn(FF, D, device="meta")}, ValueError, "weight1: got a tensor on meta, expected cpu"),
    ({"bias1": 1.0}, TypeError, "bias1: got float, expected a Tensor"),
    # dtype
    ({"input": torch.ones(T, D, dtype=torch.int64)}, TypeError, "input: got int64, expected one of float32"),
    ({"input": torch.ones(T, D, dtype=torch.complex64)}, TypeError, "input: got complex64, expected one of"),
    ({"input": torch.ones(T, D).to(torch.float8_e4m3fn)}, TypeError, "input: got float8_e4m3fn, expected one of"),
    ({"weight1": torch.randn(FF, D).half()}, TypeError, "weight1: got float16, expected float32"),
    ({"weight2": torch.randn(OUT, FF).double()}, TypeError, "weight2: got float64, expected float32"),
    ({"bias2": torch.randn(OUT).bfloat16()}, TypeError, "bias2: got bfloat16, expected float32"),
    ({"residual": torch.randn(T, OUT).half()}, TypeError, "residual: got float16, expected float32"),
    # shape
    ({"input": torch.tensor(1.0)}, ValueError, r"input: got shape \(\), expected \(..., features\) with at least one"),
    ({"input": torch.randn(T, 0)}, ValueError, r"input: got shape \(5, 0\), expected \(..., features\) with at least"),
    ({"input": torch.randn(T, D + 1)}, ValueError, r"weight1: got .*, expected \(d_ff, d_in\) = \(d_ff, 9\)"),
    ({"weight1": torch.randn(FF)}, ValueError, r"weight1: got shape \(12,\), expected \(d_ff, d_in\) = \(d_ff, 8\)"),
    ({"weight1": torch.randn(0, D)}, ValueError, r"weight1: got shape \(0, 8\), expected .*, of at least 1"),
    ({"weight2": torch.randn(FF, OUT)}, ValueError, r"weight2: got shape \(12, 6\), expected .* = \(d_out, 12\)"),
    ({"weight2": torch.randn(0, FF)}, ValueError, r"weight2: got shape \(0, 12\), expected .*, of at least 1"),
    ({"bias1": torch.randn(1)}, ValueError, r"bias1: got shape \(1,\), expected \(d_ff\) = \(12\)"),
    ({"bias2": torch.randn(1, OUT)}, ValueError, r"bias2: got shape \(1, 6\), expected \(d_out\) = \(6\)"),
    ({"gate_weight": torch.randn(FF, D + 1)}, ValueError, r"gate_weight: got shape .*, expected .* = \(12, 8\)"),
    ({"gate_bias": torch.randn(FF)}, ValueError, "gate_bias: got one without gate_weight, expected both"),
    ({**GATE, "gate_bias": torch.randn(D)}, ValueError, r"gate_bias: got shape \(8,\), expected \(d_ff\) = \(12\)"),
    ({"residual": torch.randn(OUT)}, ValueError, r"residual: got shape \(6,\), expected \(..., d_out\) = \(5, 6\)"),
    ({"residual": torch.randn(1, OUT)}, ValueError, r"residual: got shape \(1, 6\), expected .* = \(5, 6\)"),
    # numbers and names
    ({"dropout_p": -0.1}, ValueError, r"dropout_p: got -0.1, expected a probability in \[0, 1\]"),
    ({"dropout_p": float("nan")}, ValueError, "dropout_p: got nan, expected a probability"),
    ({"dropout_p": "0.1"}, TypeError, "dropout_p: got str, expected a number"),
    ({"residual_dropout_p": 1.5, "residual": torch.randn(T, OUT)}, ValueError, "residual_dropout_p: got 1.5"),
    ({"residual_dropout_p": 0.5}, ValueError, "residual_dropout_p: got 0.5 without a residual, expected one, or 0"),
    ({"activation": "tanh"}, ValueError, "activation: got 'tanh', expected one of .*'relu', 'gelu', .*or a callable"),
    ({"activation": 3}, TypeError, "activation: got int, expected one of .*'relu', 'gelu', .*, or a callable"),
    ({"precision": "fp32"}, ValueError, "precision: got 'fp32', expected one of .*'ieee', 'tf32'"),
    ({"backend": "cudnn"}, ValueError, "backend: got 'cudnn', expected one of .*'auto'.*'triton'"),
    # seed
    ({"dropout_p": 0.1, "seed": 7}, TypeError, "seed: got int, expected a Tensor"),
    ({"dropout_p": 0.1, "seed": torch.zeros(2)}, TypeError, r"seed: got float32 of shape \(2,\), expected an int64"),
    ({"residual": torch.randn(T, OUT), "residual_dropout_p": 0.1, "seed": torch.zeros(3, dtype=torch.int64)},
     TypeError, r"seed: got int64 of shape \(3,\)"),
]  # fmt: skip


@pytest.mark.parametrize(("bad", "error", "message"), BAD, ids=[message.split(",")[0] for _, _, message in BAD])
def test_a_bad_argument_is_named(bad: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        feed_forward(**tensors(**bad))


def test_parameters_and_defaults() -> None:
    parameters = inspect.signature(feed_forward).parameters
    by_position = [name for name, x in parameters.items() if x.kind is not inspect.Parameter.KEYWORD_ONLY]
    assert by_position == ["input", "weight1", "weight2", "bias1", "bias2"]
    assert {name: x.default for name, x in parameters.items() if name not in by_position[:3]} == {
        "bias1": None, "bias2": None, "activation": "relu", "gate_weight": None, "gate_bias": None, "dropout_p": 0.0,
        "residual": None, "residual_dropout_p": 0.0, "recompute": False, "precision": None, "seed": None,
        "backend": "auto",
    }  # fmt: skip


@each_backend
@pytest.mark.parametrize("leading", [(), (1,), (4,), (2, 3), (2, 1, 3), (2, 0)], ids=str)
def test_any_leading_dimensions(leading: tuple[int, ...], backend: str, device: str) -> None:
    given = {name: x.to(device) for name, x in tensors().items()}
    x, residual = torch.randn(*leading, D, device=device), torch.randn(*leading, OUT, device=device)
    out = feed_forward(**given | {"input": x}, residual=residual, backend=backend)
    assert out.shape == (*leading, OUT)
    assert out.is_contiguous()
    rows = feed_forward(**given | {"input": x.view(-1, D)}, residual=residual.view(-1, OUT), backend=backend)
    assert_equal_bits(out.view(-1, OUT), rows)


# ---- callables


TORCHS = {
    "relu": (torch.relu, F.relu),
    "gelu": (F.gelu,),
    "silu": (F.silu,),
}


@pytest.mark.parametrize(("name", "function"), [(name, f) for name, both in TORCHS.items() for f in both])
def test_torchs_own_functions_count_as_their_names(name: str, function: Any) -> None:
    explained = fusedformer.explain(feed_forward, **tensors(), activation=function)
    assert f"activation {name}," in explained.decisions[0].problem
    assert_equal_bits(feed_forward(**(given := tensors()), activation=function), feed_forward(**given, activation=name))


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_a_callable_is_computed_by_torch(backend: str) -> None:
    given = tensors(input=torch.randn(T, D, dtype=torch.float64))
    given = {name: x.double().requires_grad_() for name, x in given.items()}
    slope = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    act = lambda x: torch.where(x > 0, x, slope * x)
    out = feed_forward(**given, activation=act, backend=backend)
    expected = F.linear(act(F.linear(given["input"], given["weight1"])), given["weight2"])
    torch.testing.assert_close(out, expected)
    wanted = [*given.values(), slope]  # what the callable itself holds has a gradient too
    for one, other in zip(*(torch.autograd.grad(x.square().sum(), wanted) for x in (out, expected)), strict=True):
        torch.testing.assert_close(one, other)


@each_kernel
def test_kernels_refuse_a_callable(backend: str, device: str) -> None:
    given = {name: x.to(device) for name, x in tensors().items()}
    with pytest.raises(BackendRefused, match="a callable"):
        feed_forward(**given, activation=torch.tanh, backend=backend)
    assert feed_forward(**given, activation=torch.tanh).isfinite().all()


# ---- which backend


def refuses(backend: str, **given: Any) -> list[str]:
    """What this backend says, asked for by name."""
    with pytest.raises(BackendRefused) as caught:
        feed_forward(**given, backend=backend)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f'backend="{backend}" refuses feed_forward(input ')
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["cuda", "triton", "cpu", "torch", "reference"]
    (said,) = (line.split(": ", 1)[1] for line in lines if line.startswith(f"  {backend}: "))
    return said.split("; ")


def test_torch_says_why_not() -> None:
    seed = torch.tensor([1, 2])
    own_mask = "torch draws its own dropout mask, a seed was given"
    own_setting = "torch's products follow its own fp32 setting, a precision was given"
    assert refuses("torch", **tensors(dropout_p=0.1, seed=seed)) == [own_mask]
    assert refuses("torch", **tensors(precision="ieee")) == [own_setting]
    assert refuses("torch", **tensors(dropout_p=0.1, seed=seed, precision="tf32")) == [own_mask, own_setting]
    given = tensors()
    assert_equal_bits(feed_forward(**given, seed=seed, backend="torch"), feed_forward(**given, backend="torch"))
    half = {name: x.half() for name, x in given.items()}
    assert feed_forward(**half, precision="ieee", backend="torch").isfinite().all()


@each_kernel
def test_kernels_refuse_float64(backend: str, device: str) -> None:
    with pytest.raises(BackendRefused, match="float64"):
        feed_forward(**{name: x.to(device, torch.float64) for name, x in tensors().items()}, backend=backend)


def test_float64_goes_to_torch() -> None:
    with record_decisions() as explanation:
        feed_forward(**{name: x.double() for name, x in tensors().items()})
    assert explanation.backend == "torch"


@built
def test_the_native_kernels_are_autos_choice() -> None:
    with record_decisions() as explanation:
        feed_forward(**tensors(), activation="gelu", dropout_p=0.1)
    assert explanation.backend == "cpu"


def test_explain_shows_the_problem(seed: int) -> None:
    case = Case("", leading=(2, 3), gated=True, residual=True, dropout_p=0.5, residual_dropout_p=0.25, recompute=True)
    inputs = make_inputs(case, torch.float32, "cpu", seed).leaves()
    explanation = fusedformer.explain(feed_forward, **inputs.tensors, **inputs.options, backend="reference")
    (decision,) = explanation.decisions
    assert (decision.operation, decision.chosen) == ("feed_forward", "reference")
    assert decision.problem == (
        "input (6, 24), weight1 (40, 24), weight2 (24, 40), float32, cpu, activation relu, bias1, bias2, gate_weight, "
        "gate_bias, residual, seed, dropout_p 0.5, residual_dropout_p 0.25, precision torch, recompute, requires_grad"
    )
    assert decision.workspace_bytes >= 2 * 6 * 40 * 4
    assert "draws its own dropout mask" in str(explanation)


def test_explain_draws_no_seed() -> None:
    given, before = tensors(), torch.get_rng_state()
    fusedformer.explain(feed_forward, **given, dropout_p=0.5, backend="reference")
    assert torch.equal(torch.get_rng_state(), before)


def test_the_torch_backend_recomputes() -> None:
    """Its checkpoint draws the same dropout mask again."""
    given = {name: x.requires_grad_() for name, x in tensors().items()}
    found: list[tuple[Tensor, ...]] = []
    for recompute in (False, True):
        torch.manual_seed(3)
        out = feed_forward(**given, dropout_p=0.5, recompute=recompute, backend="torch")
        found.append((out, *torch.autograd.grad(out.square().sum(), list(given.values()))))
    for one, other in zip(*found, strict=True):
        assert_equal_bits(one, other)
    with pytest.raises(BackendRefused, match=r"takes no torch\.func transforms"):
        torch.func.grad(lambda x: feed_forward(**given | {"input": x}, recompute=True, backend="torch").sum())(
            given["input"]
        )

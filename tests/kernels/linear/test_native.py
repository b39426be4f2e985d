"""The C++ linear kernels at each instruction set level that this machine runs: sizes around the edges of their blocks,
numbers of any magnitude, threads, and the memory they state. The rest of the contract is tested in the other files."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from fusedformer import explain, use_backend
from fusedformer.functional import linear
from fusedformer.kernels.common import native
from fusedformer.kernels.common.backend import record_decisions
from tests.lanes import RUNNABLE, built, every_level
from tests.operators import is_short
from tests.tolerances import assert_equal_bits, assert_within_contract

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ATTEMPTS = {torch.float32: 6}
Given = tuple[Tensor, Tensor, Tensor, Tensor]  # input, weight, bias, grad_out
Results = dict[str, Tensor]


def make(rows: int, in_features: int, out_features: int, dtype: torch.dtype, seed: int) -> Given:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, in_features), (out_features, in_features), (out_features,), (rows, out_features))
    x, weight, bias, grad_out = (torch.randn(shape, generator=generator) for shape in shapes)
    weight /= in_features**0.5
    return x.to(dtype), weight.to(dtype), bias.to(dtype), grad_out.to(dtype)


def results(function: Callable[[Tensor, Tensor, Tensor], Tensor], given: Given) -> Results:
    leaves = [x.detach().requires_grad_() for x in given[:3]]
    out = function(*leaves)
    grads = torch.autograd.grad(out, leaves, given[3])
    return dict(zip(("out", "grad input", "grad weight", "grad bias"), (out.detach(), *grads), strict=True))


def eager(input: Tensor, weight: Tensor, bias: Tensor, *, attempt: int = 0) -> Tensor:
    """``attempt`` changes the order of every sum."""
    if attempt == 0:
        return F.linear(input, weight, bias)
    tokens, features = torch.randperm(input.size(0)), torch.randperm(input.size(1))
    return F.linear(input[tokens][:, features], weight[:, features], bias)[tokens.argsort()]


def check_each_level(given: Given) -> None:
    truth = results(eager, tuple(x.double() for x in given))  # type: ignore[arg-type]
    attempts = [results(partial(eager, attempt=i), given) for i in range(ATTEMPTS.get(given[0].dtype, 2))]
    for name in RUNNABLE:
        with native.use_level(name):
            actual = results(partial(linear, backend="cpu"), given)
        for result, x in actual.items():
            assert_within_contract(x, truth[result], [attempt[result] for attempt in attempts], f"{name}: {result}")


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [*range(2, 14), 15, 16, 17, 31, 32, 33, 95, 96, 97, 127, 128, 129])
def test_every_remainder_of_rows(rows: int, dtype: torch.dtype, seed: int) -> None:
    check_each_level(make(rows, 40, 24, dtype, seed))


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", [1, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129])
def test_every_remainder_of_features(features: int, dtype: torch.dtype, seed: int) -> None:
    for rows in (7, 20):  # of few numbers the largest error is a matter of luck
        check_each_level(make(rows, features, 160 - features, dtype, seed))


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sizes",
    [(530, 70, 530), (70, 1100, 33), (1100, 33, 70), (40, 30, 1040), (5, 1090, 70), (48, 1100, 600), (250, 300, 600)],
    ids=str,
)
def test_more_than_a_block(sizes: tuple[int, int, int], dtype: torch.dtype, seed: int) -> None:
    check_each_level(make(*sizes, dtype, seed))


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [17, 130, 50_003])
def test_sums_of_many_rows(rows: int, dtype: torch.dtype, seed: int) -> None:
    """Of one sign: each addition to a long sum would lose the more of what it adds."""
    x, weight, bias, grad_out = make(rows, 5, 70, dtype, seed)
    check_each_level((x, weight, bias, grad_out.abs()))


MAGNITUDES = {  # of input, weight, gradient
    "tiny": (1e-18, 1e-15, 1e-10),
    "huge": (1e15, 1e15, 1e10),
    "apart": (1e-30, 1e30, 1.0),
    "denormal input": (1e-40, 1.0, 1.0),
    "denormal weight": (1.0, 1e-40, 1.0),
    "denormal gradient": (1.0, 1.0, 1e-40),
    "zero": (0.0, 1.0, 0.0),
}


@built
@pytest.mark.parametrize("magnitude", MAGNITUDES)
def test_float32_of_any_magnitude(magnitude: str, seed: int) -> None:
    """What is split into parts of fewer bits must not lose the small ones, nor overflow."""
    of_input, of_weight, of_grad = MAGNITUDES[magnitude]
    x, weight, bias, grad_out = make(33, 65, 40, torch.float32, seed)
    check_each_level((x * of_input, weight * of_weight, bias * of_input * of_weight, grad_out * of_grad))


@every_level
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_change_no_bits(level: str, dtype: torch.dtype, seed: int) -> None:
    for sizes in ((3, 70, 300), (150, 300, 140)):
        given, threads = make(*sizes, dtype, seed), torch.get_num_threads()
        of_threads = []
        try:
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                of_threads.append(results(partial(linear, backend="cpu"), given))
        finally:
            torch.set_num_threads(threads)
        for other in of_threads[1:]:
            for name, x in other.items():
                assert_equal_bits(x, of_threads[0][name], name)


@every_level
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_does_not_grow_with_the_sizes(dtype: torch.dtype, level: str) -> None:
    def stated(rows: int, features: int, gradients: bool) -> int:
        with FakeTensorMode():
            x = torch.empty(rows, features, dtype=dtype, requires_grad=gradients)
            weight = torch.empty(features, features, dtype=dtype)
            (decision,) = explain(partial(linear, backend="cpu"), x, weight).decisions
        assert decision.chosen == "cpu"
        assert f"instruction set level {level}" in str(decision)
        return decision.workspace_bytes

    for gradients in (False, True):
        assert 0 < stated(1 << 12, 1 << 12, gradients) == stated(1 << 16, 1 << 14, gradients) < 1 << 23
    assert 0 < stated(1, 1 << 12, False) < 1 << 15  # a row, in float32


# The short way of plain calls


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("leading", [(1,), (), (3, 1, 2), (20,)], ids=str)
def test_the_short_way_gives_what_the_long_one_does(
    leading: tuple[int, ...], dtype: torch.dtype, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, weight, bias, _ = make(1, 33, 21, dtype, seed)
    x = torch.randn(*leading, 33, generator=torch.Generator().manual_seed(seed)).to(dtype)
    wide = torch.cat((x, x), -1)
    for given in ((x, weight, bias), (x, weight, None), (wide[..., :33], weight, bias)):
        function = partial(linear, *given)
        with record_decisions():  # which is never skipped
            long = function()
        assert is_short(function, monkeypatch) is (given[0].is_contiguous() or given[0].dim() == 2)
        short = function()
        assert_equal_bits(short, long)
        assert short.stride() == long.stride()


@built
def test_the_short_way_is_left_where_there_is_more_to_it(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias, _ = make(3, 33, 21, torch.float32, seed)
    given: dict[str, Any] = {"input": x, "weight": weight, "bias": bias}

    def short(**changed: Any) -> bool:
        return is_short(partial(linear, **{**given, **changed}), monkeypatch)

    assert short()
    assert short(bias=None)
    for name, option in {"precision": "ieee", "backend": "torch"}.items():
        assert not short(**{name: option}), name
    for name, tensor in given.items():
        leaf = tensor.clone().requires_grad_()
        assert not short(**{name: leaf}), name
        with torch.no_grad():
            assert short(**{name: torch.nn.Parameter(leaf)} if name != "input" else {name: leaf}), name
        if tensor.dim() == 2:
            assert not short(**{name: tensor.mT.contiguous().mT}), name
    assert not short(input=x[:0])
    with use_backend("reference"):
        assert not short()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not short()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert not short()
    mapped = torch.func.vmap(lambda row: linear(row, weight, bias))
    assert not is_short(lambda: mapped(x[:, None]), monkeypatch)


@built
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_the_short_way_lets_no_mistake_pass(name: str, seed: int) -> None:
    x, weight, bias, _ = make(3, 33, 21, torch.float32, seed)
    given: dict[str, Any] = {"weight": weight, "bias": bias}
    for wrong in (given[name][..., :-1], given[name].double(), given[name][None], given[name].int()):
        with pytest.raises((ValueError, TypeError), match=name):
            linear(x, **{**given, name: wrong})

"""The C++ feed-forward kernels at each instruction set level that this machine runs: sizes around the edges of their
blocks, their activations over the whole range, threads, and the memory they state. The rest of the contract is tested
in the other files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fusedformer import explain, use_backend
from fusedformer.functional import feed_forward
from fusedformer.kernels.common import native
from fusedformer.kernels.common.backend import record_decisions
from tests.kernels.feed_forward.cases import Case, Inputs, make_inputs
from tests.kernels.feed_forward.eager import ACTIVATIONS, Results, expected, fused, results
from tests.lanes import RUNNABLE, built, every_level
from tests.operators import is_short
from tests.tolerances import assert_equal_bits, assert_within_contract

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EVERYTHING = Case(
    "everything", d_in=33, d_ff=70, d_out=40, gated=True, activation="silu", residual=True, dropout_p=0.2,
    residual_dropout_p=0.1,
)  # fmt: skip


def check_each_level(inputs: Inputs) -> None:
    truth, attempts = expected(inputs)
    for name in RUNNABLE:
        with native.use_level(name):
            actual = results(fused("cpu"), inputs)
        for result, x in actual.items():
            assert_within_contract(x, truth[result], [attempt[result] for attempt in attempts], f"{name}: {result}")


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [2, 4, 5, 6, 7, 8, 9, 11, 12, 13, 15, 16, 24, 31, 33, 47, 64, 97, 129])
def test_every_remainder_of_tokens(tokens: int, dtype: torch.dtype, seed: int) -> None:
    for recompute in (False, True):
        case = Case("", leading=(tokens,), d_in=24, d_ff=40, activation="gelu", dropout_p=0.1, recompute=recompute)
        check_each_level(make_inputs(case, dtype, "cpu", seed))


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", [1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129])
def test_every_remainder_of_features(features: int, dtype: torch.dtype, seed: int) -> None:
    for tokens in (7, 20):  # of few numbers the largest error is a matter of luck
        case = replace(EVERYTHING, leading=(tokens,), d_in=160 - features, d_ff=features, d_out=features + 3)
        check_each_level(make_inputs(case, dtype, "cpu", seed))


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case("tokens", leading=(512,), d_in=16, d_ff=40, activation="gelu_tanh", residual=True, residual_dropout_p=0.3),
        Case("tokens", leading=(513,), d_in=16, d_ff=40, activation="gelu", dropout_p=0.3, recompute=True),
        Case("tokens", leading=(1030,), d_in=16, d_ff=24, activation="silu", gated=True, dropout_p=0.1, residual=True,
             residual_dropout_p=0.2),
        Case("tokens", leading=(1030,), d_in=16, d_ff=24, activation="gelu", gated=True, recompute=True),
        Case("d_ff", leading=(64,), d_in=300, d_ff=600, activation="silu", gated=True, dropout_p=0.1, residual=True),
        Case("depth", leading=(20,), d_in=1040, d_ff=30, activation="gelu", gated=True),
        Case("columns", leading=(20,), d_in=30, d_ff=1040, activation="relu2", gated=True, dropout_p=0.1),
    ],
    ids=str,
)  # fmt: skip
def test_more_than_a_block(case: Case, dtype: torch.dtype, seed: int) -> None:
    check_each_level(make_inputs(case, dtype, "cpu", seed))


# Exact in float64 also where torch's formula for gelu and its tanh form cancels.
EXACT = ACTIVATIONS | {
    "gelu": lambda x: x * torch.special.erfc(-x * 0.5**0.5) / 2.0,
    "gelu_tanh": lambda x: x * torch.sigmoid((8.0 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)),
}


@built
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_over_their_range(activation: str) -> None:
    """Of single numbers, which the products leave as they are. Each stretch of the range is judged by itself: an error
    that is small beside 1 may be large in a tail."""
    one = torch.ones(1, 1)
    for start in torch.arange(-16.0, 16.0, 0.5):
        x = start + torch.arange(256)[:, None] / 512
        inputs = Inputs({"input": x}, torch.ones_like(x))
        truth = results(lambda input: EXACT[activation](input), inputs.to(torch.float64))
        eager = results(lambda input: ACTIVATIONS[activation](input), inputs)
        for name in RUNNABLE:
            with native.use_level(name):
                actual = results(fused("cpu", weight1=one, weight2=one, activation=activation), inputs)
            for result, value in actual.items():
                assert_within_contract(value, truth[result], eager[result], f"{name}: {result} from {start}")


@built
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_far_out(activation: str) -> None:
    one, far = torch.ones(1, 1), torch.tensor([0.0, 2.0**7, 2.0**20, 2.0**60])[:, None]
    for name in RUNNABLE:
        with native.use_level(name):
            act = partial(feed_forward, weight1=one, weight2=one, activation=activation, backend="cpu")
            assert_equal_bits(act(far), far.square() if activation == "relu2" else far, name)
            assert_equal_bits(act(-far), torch.zeros_like(far), name)
            assert act(one * float("nan")).isnan().all(), name


@built
@pytest.mark.parametrize("name", ["input", "weight1", "weight2", "gate_weight", "grad_out"])
def test_tiny_float32_numbers_are_not_lost(name: str, seed: int) -> None:
    """What the tile unit would split into parts that it counts as 0."""
    inputs = make_inputs(replace(EVERYTHING, activation="silu", without=("bias1", "bias2")), torch.float32, "cpu", seed)
    tensors = {key: x * 1e-36 if key == name else x for key, x in inputs.tensors.items() if key != "residual"}
    options = {key: value for key, value in inputs.options.items() if key != "residual_dropout_p"}
    grad_out = inputs.grad_out * (1e-36 if name == "grad_out" else 1.0)
    check_each_level(Inputs(tensors, grad_out, options))


@every_level
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_only_what_is_asked_for(level: str, dtype: torch.dtype, seed: int) -> None:
    """Each gradient alone has the bits that it has among all."""
    for recompute in (False, True):
        inputs = make_inputs(replace(EVERYTHING, leading=(530,), recompute=recompute), dtype, "cpu", seed)
        every = results(fused("cpu"), inputs)
        for name, x in inputs.tensors.items():
            leaf = x.detach().requires_grad_()
            given: dict[str, Any] = inputs.tensors | {name: leaf} | inputs.options
            out = feed_forward(**given, backend="cpu")
            assert_equal_bits(torch.autograd.grad(out, leaf, inputs.grad_out)[0], every[f"grad {name}"], name)


@every_level
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [3, 140, 600])
def test_threads_change_no_bits(tokens: int, level: str, dtype: torch.dtype, seed: int) -> None:
    inputs, threads = make_inputs(replace(EVERYTHING, leading=(tokens,)), dtype, "cpu", seed), torch.get_num_threads()
    of_threads: list[Results] = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            of_threads.append(results(fused("cpu"), inputs))
    finally:
        torch.set_num_threads(threads)
    for other in of_threads[1:]:
        for name, x in other.items():
            assert_equal_bits(x, of_threads[0][name], name)


@every_level
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("recompute", [False, True])
def test_memory_does_not_grow_with_the_tokens(recompute: bool, dtype: torch.dtype, level: str) -> None:
    def stated(tokens: int, gradients: bool, gated: bool) -> int:
        with FakeTensorMode():
            x = torch.empty(tokens, 256, dtype=dtype, requires_grad=gradients)
            weight1, weight2 = torch.empty(1024, 256, dtype=dtype), torch.empty(256, 1024, dtype=dtype)
            network = partial(feed_forward, recompute=recompute, gate_weight=weight1 if gated else None, backend="cpu")
            (decision,) = explain(network, x, weight1, weight2, dropout_p=0.1).decisions
        assert decision.chosen == "cpu"
        return decision.workspace_bytes

    for gated in (False, True):
        for gradients in (False, True):
            assert 0 < stated(1 << 12, gradients, gated) == stated(1 << 16, gradients, gated) < 1 << 25
        assert stated(1, False, gated) < 1 << 14  # rows of one token


# The short way of plain calls

PLAIN = {
    "plain": Case(""),
    "one token": Case("", leading=(1,), d_in=33, d_ff=65, activation="gelu"),
    "a vector": Case("", leading=(), activation="gelu_tanh"),
    "many dimensions": Case("", leading=(1, 2, 1, 3), d_out=7, activation="silu", residual=True),
    "no bias": Case("", without=("bias1", "bias2")),
    "gated": Case("", gated=True, activation="relu2"),
}


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("said", PLAIN)
def test_the_short_way_gives_what_the_long_one_does(
    said: str, dtype: torch.dtype, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make_inputs(PLAIN[said], dtype, "cpu", seed)
    function = partial(fused("auto"), **inputs.tensors, **inputs.options)
    with record_decisions():  # which is never skipped
        long = function()
    assert is_short(function, monkeypatch)
    short = function()
    assert_equal_bits(short, long)
    assert short.stride() == long.stride()


@built
def test_the_short_way_is_left_where_there_is_more_to_it(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given = make_inputs(Case("", gated=True, residual=True), torch.float32, "cpu", seed).tensors
    call: Callable[..., Any] = feed_forward

    def short(**changed: Any) -> bool:
        return is_short(lambda: call(**{**given, **changed}), monkeypatch)

    assert short()
    assert short(recompute=True)  # of which there is nothing without a gradient
    options: dict[str, Any] = {"dropout_p": 0.5, "residual_dropout_p": 0.5, "activation": torch.tanh}
    for name, option in (options | {"precision": "ieee", "backend": "torch"}).items():
        assert not short(**{name: option}), name
    for name, x in given.items():
        leaf = x.clone().requires_grad_()
        assert not short(**{name: leaf}), name
        with torch.no_grad():
            assert short(**{name: torch.nn.Parameter(leaf)} if name != "input" else {name: leaf}), name
        if x.dim() == 2:
            assert not short(**{name: x.mT.contiguous().mT}), name
    assert not short(input=given["input"][:0], residual=given["residual"][:0])
    with use_backend("reference"):
        assert not short()
    assert explain(call, **given).backend == "cpu"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not short()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert not short()
    mapped = torch.func.vmap(lambda x: call(**{**given, "input": x, "residual": None}))
    assert not is_short(lambda: mapped(given["input"][:, None]), monkeypatch)


@built
@pytest.mark.parametrize("name", ["weight1", "weight2", "bias1", "bias2", "gate_weight", "gate_bias", "residual"])
def test_the_short_way_lets_no_mistake_pass(name: str, seed: int) -> None:
    given = make_inputs(Case("", gated=True, residual=True), torch.float32, "cpu", seed).tensors
    call: Callable[..., Any] = feed_forward
    x = given[name]
    for wrong in (x[..., :-1], x.double(), x[None], x.int()):
        with pytest.raises((ValueError, TypeError), match=name):
            call(**{**given, name: wrong})

"""What is the C++ kernels' alone: threads, scratch memory, what they write, and the short way of plain calls."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fusedformer import explain, use_backend
from fusedformer.functional import dropout_add_layer_norm, dropout_add_rms_norm
from fusedformer.kernels.common.backend import record_decisions
from tests.kernels.norm.cases import DTYPES, NORMS, Case, make_inputs
from tests.kernels.norm.eager import Results, fused, results
from tests.lanes import built, every_level
from tests.operators import is_short
from tests.tolerances import assert_equal_bits

LONG = Case("", shape=(300, 70), dropout_p=0.1)  # chunks of rows, the last one not full


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@every_level
@pytest.mark.parametrize("norm", NORMS)
def test_the_same_bits_with_any_number_of_threads(norm: str, level: str, seed: int) -> None:
    inputs = make_inputs(replace(LONG, norm=norm), torch.float32, "cpu", seed)
    alone = results(fused(inputs, "cpu"), inputs)
    for count in (2, 5):
        with threads(count):
            together = results(fused(inputs, "cpu"), inputs)
        for name, x in together.items():
            assert_equal_bits(x, alone[name], name)


@every_level
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_memory_held_before_is_not_read(dtype: torch.dtype, level: str, seed: int) -> None:
    """Scratch memory is kept between calls: here the one before filled it with NaN."""
    inputs = make_inputs(LONG, dtype, "cpu", seed)
    clean = results(fused(inputs, "cpu"), inputs)
    spoiled = replace(inputs, tensors={name: x * float("nan") for name, x in inputs.tensors.items()})
    results(fused(spoiled, "cpu"), spoiled)
    for name, x in results(fused(inputs, "cpu"), inputs).items():
        assert_equal_bits(x, clean[name], name)


@every_level
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", [1, 7, 40, 70])
def test_nothing_beside_the_results_is_written(features: int, dtype: torch.dtype, level: str, seed: int) -> None:
    """Each result a part of a larger buffer."""
    inputs = make_inputs(Case("", shape=(35, features), dropout_p=0.2), dtype, "cpu", seed)
    expected = results(fused(inputs, "cpu"), inputs)
    buffers: list[Tensor] = []

    def framed(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        size = torch.Size(shape).numel()
        buffers.append(torch.full((size + 64,), 7.0, dtype=dtype))
        return buffers[-1][32:-32].view(shape)

    t, options = inputs.tensors, inputs.options
    dropping = (round(65536 * options["dropout_p"]), 1 / (1 - round(65536 * options["dropout_p"]) / 65536))
    out, total, mean, rstd = (
        framed(35, features), framed(35, features), framed(35, dtype=torch.float32), framed(35, dtype=torch.float32),
    )  # fmt: skip
    given = (t["input"], t["residual"], t["weight"], t["bias"], options["seed"], True, 1e-5, *dropping)
    torch.ops.fusedformer_native.norm_forward_cpu(*given, out, total, mean, rstd)
    grads = (framed(35, features), framed(35, features), framed(features), framed(features))
    sent = (inputs.grad_out, inputs.grad_sum, total, mean, rstd, t["weight"], options["seed"], *dropping)
    torch.ops.fusedformer_native.norm_backward_cpu(*sent, *grads, framed(2, 2, features, dtype=torch.float32))
    for (name, x), found in zip(expected.items(), (out, total, *grads), strict=True):
        assert_equal_bits(found, x, name)
    for buffer in buffers:
        assert (buffer[:32] == 7.0).all()
        assert (buffer[-32:] == 7.0).all()


@every_level
def test_another_thread_has_scratch_of_its_own(level: str, seed: int) -> None:
    inputs = make_inputs(LONG, torch.float32, "cpu", seed)
    alone = results(fused(inputs, "cpu"), inputs)
    found: list[Results] = []
    workers = [threading.Thread(target=lambda: found.append(results(fused(inputs, "cpu"), inputs))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 4
    for other in found:
        for name, x in other.items():
            assert_equal_bits(x, alone[name], name)


@every_level
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sums_are_rounded_as_torch_rounds(dtype: torch.dtype, level: str, seed: int) -> None:
    """Ties, denormals, overflow, infinities and NaN among them: every number of 16 bits, and another."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).view(256, 256)
    other = every.flatten()[torch.randperm(1 << 16)].view(256, 256)
    near = (every.double() * (1 + torch.finfo(dtype).eps * torch.randn(256, 256).double())).to(dtype)
    for beside in (other, near, -near, torch.zeros_like(every)):
        _, total = dropout_add_rms_norm(every, beside, None, return_sum=True, backend="cpu")
        expected = every + beside
        assert torch.equal(total.isnan(), expected.isnan())
        assert_equal_bits(total.nan_to_num(), expected.nan_to_num())


# The short way of plain calls


PLAIN = {
    "plain": Case(""),
    "no residual": Case("", residual="", parameters="w"),
    "no weight": Case("", parameters="b", eps=0.1),
    "nothing": Case("", residual="", parameters="", shape=(9,)),
    "many dimensions": Case("", shape=(1, 2, 1, 3, 1, 33)),
    "rms_norm": Case("", norm="rms_norm"),
}


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("said", PLAIN)
def test_the_short_way_gives_what_the_long_one_does(
    said: str, dtype: torch.dtype, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make_inputs(PLAIN[said], dtype, "cpu", seed)
    function = lambda: fused(inputs, "auto", return_sum=False)(**inputs.tensors)
    with record_decisions():  # which is never skipped
        long: Any = function()
    assert is_short(function, monkeypatch)
    short: Any = function()
    assert_equal_bits(short, long)
    assert short.stride() == long.stride()


@built
def test_the_short_way_is_left_where_there_is_more_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    x, vector = torch.randn(3, 8), torch.randn(8)
    call: Callable[..., Any] = dropout_add_layer_norm

    def short(function: Callable[[], Any]) -> bool:
        return is_short(function, monkeypatch)

    assert short(lambda: call(x, x, vector, vector))
    for options in ({"dropout_p": 0.5}, {"return_sum": True}, {"backend": "torch"}, {"backend": "reference"}):
        assert not short(lambda: call(x, x, vector, vector, **options)), options  # noqa: B023
    for position in range(4):
        tensors = [x, x, vector, vector]
        tensors[position] = tensors[position].clone().requires_grad_()
        assert not short(lambda: call(*tensors))  # noqa: B023
        assert call(*tensors).requires_grad
        with torch.no_grad():
            assert short(lambda: call(*tensors))  # noqa: B023
    assert not short(lambda: call(x.double(), None, None, None))
    assert not short(lambda: call(x, x.bfloat16(), None, None))
    assert not short(lambda: call(x.bfloat16(), None, vector, None))
    assert not short(lambda: call(x.T.contiguous().T, x, vector, vector))
    assert not short(lambda: call(x[:0], x[:0], vector, vector))
    with use_backend("reference"):
        assert not short(lambda: call(x, x, vector, vector))
    assert explain(call, x, x, vector, vector).backend == "cpu"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not short(lambda: call(x, x, vector, vector))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(x)
        assert type(call(fake, fake, None, None)) is type(fake)
        assert not short(lambda: call(x, x, vector, vector))
    assert not short(lambda: torch.func.vmap(lambda x: call(x, x, vector, vector))(x))
    assert not short(lambda: torch.func.grad(lambda x: call(x, x, vector, vector).sum())(x))


@built
@pytest.mark.parametrize("function", [dropout_add_layer_norm, dropout_add_rms_norm])
def test_the_short_way_takes_parameters_as_modules_hold_them(
    function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.nn.Parameter(torch.randn(8))
    given = (torch.randn(3, 8), None, weight, weight)[: 4 if function is dropout_add_layer_norm else 3]
    with torch.no_grad():
        assert is_short(lambda: function(*given), monkeypatch)

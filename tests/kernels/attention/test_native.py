"""The C++ kernels at each instruction set level that this machine runs, against the float64 oracle; and what is theirs
alone: levels, scratch memory and threads. The rest of the contract is tested on them, as on every backend, in the other
files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fusedformer import explain
from fusedformer.functional import attention
from fusedformer.kernels.attention import native_cpu, problem
from fusedformer.kernels.common import native
from fusedformer.kernels.common.explain import report
from tests.cases import CASES, Case, make_inputs
from tests.kernels.attention.eager import Results, call, expected, fused, results
from tests.lanes import LEVELS, RUNNABLE, built, every_level
from tests.tolerances import assert_equal_bits, assert_no_mistake, assert_within_contract

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
INF = float("inf")

# More keys than a task of backward, more queries and keys than a block, more of both than a cache holds.
LONG = (
    Case("long", batch=1, heads=1, len_q=70, len_k=1100, head_dim=24, is_causal=True, causal_alignment="bottom_right"),
    Case("long queries", batch=1, heads=1, len_q=700, len_k=70, head_dim=16, is_causal=True, dropout_p=0.1),
    Case("long padding", heads=1, len_q=33, len_k=1030, head_dim=16, key_mask="bool"),
    Case("long bias", batch=1, heads=2, heads_kv=1, len_q=40, len_k=600, head_dim=16, mask="float 1HLS"),
    Case("long window", batch=1, heads=1, len_q=600, head_dim=16, window=(70, 0), sinks=True),
    Case("long head", batch=1, heads=1, len_q=20, len_k=520, head_dim=256, softcap=3.0),
    Case("queries share keys", batch=1, heads=6, heads_kv=2, len_q=130, len_k=70, head_dim=16, alibi="H"),
)  # fmt: skip


def check_each_level(case: Case, dtype: torch.dtype, seed: int) -> None:
    """The contract, at every level; the truth is computed once."""
    if dtype == torch.float32:
        # The largest error of a small tensor is a matter of luck, eager's as ours: a larger one leaves less to it.
        numbers = case.batch * case.heads * case.len_q * case.head_dim
        case = replace(case, batch=case.batch * min(max(4, 8192 // numbers), 64))
    inputs = make_inputs(case, dtype, "cpu", seed)
    truth, attempts = expected(inputs)
    for name in RUNNABLE:
        with native.use_level(name):
            actual = results(fused("cpu"), inputs)
        for result, x in actual.items():
            assert_within_contract(x, truth[result], [attempt[result] for attempt in attempts], f"{name}: {result}")


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, *LONG], ids=str)
def test_every_level_holds_the_contract(case: Case, dtype: torch.dtype, seed: int) -> None:
    check_each_level(case, dtype, seed)


def test_ci_builds_the_extension_with_the_emulated_levels() -> None:
    assert os.environ.get("CI") != "true" or {"emulated", "emulated_bf16"} <= LEVELS.keys(), native.EXTENSION.absence


@pytest.mark.parametrize("name", ["amx", "avx512_bf16", "avx512", "avx2", "portable"])
@built
def test_a_level_computes_or_says_why_not(name: str, seed: int) -> None:
    """Never an illegal instruction: a level that is refused cannot be chosen."""
    inputs = make_inputs(Case("", len_q=65, is_causal=True), torch.bfloat16, "cpu", seed)
    reason = LEVELS[name]
    if reason is None:
        with native.use_level(name):
            assert native.level() == name
            out = attention(inputs.query, inputs.key, inputs.value, is_causal=True, backend="cpu")
        truth = call(*(x.double() for x in (inputs.query, inputs.key, inputs.value)), is_causal=True)
        assert_no_mistake(out, truth)
        return
    before = native.level()
    with pytest.raises(ValueError, match=f"level: got '{name}', but {reason}"), native.use_level(name):
        pass
    with pytest.raises(ValueError, match=f"level: got {name}, but {reason}"):
        torch.ops.fusedformer_native.choose_cpu_level(name)
    assert native.level() == before


@built
def test_a_level_that_there_is_not() -> None:
    with pytest.raises(ValueError, match=r"level: got 'sse9', expected one of \('amx', 'avx512_bf16', 'avx512'"):
        native.use_level("sse9").__enter__()
    with pytest.raises(ValueError, match="level: got sse9, expected one of amx, avx512_bf16, avx512, avx2, portable"):
        torch.ops.fusedformer_native.choose_cpu_level("sse9")


@built
def test_a_level_is_chosen_for_a_while() -> None:
    best = native.level()
    assert best == next(name for name in RUNNABLE if not name.startswith("emulated"))

    def fail() -> None:
        with native.use_level("portable"):
            assert native.level() == "portable"
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert native.level() == best


@built
def test_the_report_and_explain_say_the_level() -> None:
    lines = report().splitlines()
    for name, reason in LEVELS.items():
        (line,) = (line for line in lines if line.split()[:1] == [name])
        assert reason is None or reason in line
    assert f"  {native.level():<10} in use" in lines
    query = torch.zeros(1, 2, 5, 8)
    with native.use_level("portable"):
        assert "note: instruction set level portable" in str(explain(attention, query, query, query))


@every_level
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_does_not_grow_with_the_square_of_the_length(dtype: torch.dtype, level: str) -> None:
    def stated(length: int, gradients: bool) -> int:
        with FakeTensorMode():
            query = torch.empty(1, 2, length, 64, dtype=dtype, requires_grad=gradients)
            (decision,) = explain(call, query, query, query, is_causal=True).decisions
        assert decision.chosen == "cpu"
        return decision.workspace_bytes

    for gradients in (False, True):
        short, long = stated(1 << 14, gradients), stated(1 << 16, gradients)
        assert 0 < short <= long < 5 * short
        assert long < 1 << 28  # bytes; the scores would be 1 << 35


HEAD_DIMS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 40, 63, 64, 65, 80, 96, 100, 127, 128, 129, 192, 255, 257, 320)


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_head_dim(head_dim: int, dtype: torch.dtype, seed: int) -> None:
    value_dim = HEAD_DIMS[-1 - HEAD_DIMS.index(head_dim)]
    case = Case("", batch=1, len_q=9, len_k=37, head_dim=head_dim, value_dim=value_dim, is_causal=True,
                causal_alignment="bottom_right")  # fmt: skip
    check_each_level(case, dtype, seed)


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("len_k", [3, 4, 15, 16, 31, 32, 33, 47, 63, 64, 65, 511, 512, 513])
def test_every_remainder_of_keys(len_k: int, dtype: torch.dtype, seed: int) -> None:
    check_each_level(Case("", batch=1, heads=1, len_q=5, len_k=len_k, head_dim=8), dtype, seed)


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("len_q", [2, 5, 6, 7, 11, 12, 13, 16, 23, 24, 25, 31, 32, 33, 47, 48, 49, 64])
def test_every_remainder_of_queries(len_q: int, dtype: torch.dtype, seed: int) -> None:
    check_each_level(Case("", batch=1, heads=1, len_q=len_q, len_k=21, head_dim=8), dtype, seed)


MAGNITUDES = {  # of query, key, value, and the scale that makes scores of order 1
    "tiny": (1e-18, 1e-18, 1e-30, 1e36),
    "huge": (1e15, 1e15, 1e30, 1e-31),
    "apart": (1e-30, 1e30, 1.0, 0.2),
    "denormal query": (1e-40, 1.0, 1.0, 1e38),
    "denormal value": (1.0, 1.0, 1e-40, 0.2),
    "zero query": (0.0, 1.0, 1.0, 0.2),
}


@built
@pytest.mark.parametrize("magnitude", MAGNITUDES)
def test_float32_of_any_magnitude(magnitude: str, seed: int) -> None:
    """What is split into parts of fewer bits must not lose the small ones, nor overflow."""
    of_query, of_key, of_value, scale = MAGNITUDES[magnitude]
    case = Case("", batch=1, len_q=33, len_k=65, scale=scale)
    inputs = make_inputs(case, torch.float32, "cpu", seed)
    inputs = replace(inputs, query=inputs.query * of_query, key=inputs.key * of_key, value=inputs.value * of_value)
    truth, *eager = (
        fused("reference")(*(x.to(dtype) for x in (inputs.query, inputs.key, inputs.value)), scale=scale)
        for dtype in (torch.float64, torch.float32)
    )
    for name in RUNNABLE:
        with native.use_level(name):
            out, lse = fused("cpu")(inputs.query, inputs.key, inputs.value, scale=scale)
        assert_within_contract(out, truth[0], eager[0][0], name)
        assert_within_contract(lse, truth[1], eager[0][1], name)


@every_level
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_far_apart(level: str, dtype: torch.dtype, seed: int) -> None:
    """In rising order, so that each block's largest score is far above the last one's; and falling."""
    query = torch.ones(1, 2, 3, 16, dtype=dtype)
    steps = torch.arange(200.0).mul(40)[:, None].expand(200, 16)
    key = torch.stack((steps, steps.flip(0)))[None].to(dtype)
    value = torch.randn(1, 2, 200, 16, dtype=dtype)
    out, lse = attention(query, key, value, scale=1.0, return_lse=True, backend="cpu")
    truth, exact = attention(query.double(), key.double(), value.double(), scale=1.0, return_lse=True)
    assert_no_mistake(out, truth)
    torch.testing.assert_close(lse, exact.float())


MASK_DTYPES = [torch.bool, torch.float32, torch.float16, torch.bfloat16, torch.float64]
MASK_VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT,
    "every other": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "unaligned": lambda x: torch.cat((x.new_zeros(3), x.flatten()))[3:].view_as(x),
    "rows of stride 0": lambda x: x[..., :1, :].expand_as(x),
    "keys of stride 0": lambda x: x[..., :1].expand_as(x),
}


@every_level
@pytest.mark.parametrize("view", MASK_VIEWS)
@pytest.mark.parametrize("mask_dtype", MASK_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masks_of_every_dtype_and_stride(
    dtype: torch.dtype, mask_dtype: torch.dtype, view: str, level: str, seed: int
) -> None:
    inputs = make_inputs(Case("", len_k=37, head_dim=8), dtype, "cpu", seed)
    masks = {"attn_mask": torch.randn(2, 2, 17, 37), "key_mask": torch.randn(2, 37)}
    options = {
        name: MASK_VIEWS[view](mask > -1 if mask_dtype == torch.bool else mask.to(mask_dtype))
        for name, mask in masks.items()
    }
    inputs = replace(inputs, options=options)
    wide = {name: x if x.dtype == torch.bool else x.double() for name, x in options.items()}
    truth = results(fused("reference"), replace(inputs.to(torch.float64), options=wide))
    for name, x in results(fused("cpu"), inputs).items():
        coarser = max(dtype, x.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        assert_no_mistake(x.to(coarser), truth[name], name)
        if name.endswith("mask"):
            assert x.dtype == mask_dtype


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@every_level
@pytest.mark.parametrize("case", [*LONG[:5], CASES[-2]], ids=str)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_any_number_of_threads(count: int, case: Case, level: str, seed: int) -> None:
    inputs = make_inputs(case, torch.float32, "cpu", seed)
    with threads(count):
        first, second = (results(fused("cpu"), inputs) for _ in range(2))
    truth = results(fused("reference"), inputs.to(torch.float64))
    for name, x in second.items():
        assert_equal_bits(x, first[name], name)
        assert_no_mistake(x, truth[name], name)


@every_level
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [CASES[0], CASES[-2], *LONG[1:3]], ids=str)
def test_what_memory_held_before_is_not_read(case: Case, dtype: torch.dtype, level: str, seed: int) -> None:
    """Scratch memory is kept between calls: here the one before filled it with NaN."""
    inputs = make_inputs(case, dtype, "cpu", seed)
    clean = results(fused("cpu"), inputs)
    nan = {name: getattr(inputs, name) * float("nan") for name in ("query", "key", "value", "grad_out", "grad_lse")}
    results(fused("cpu"), replace(inputs, **nan))
    for name, x in results(fused("cpu"), inputs).items():
        assert_equal_bits(x, clean[name], name)


class Framed:
    """Stands for the allocators of results: each result is a view inside a larger buffer, of which nothing else may be
    written."""

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []

    def __call__(self, like: Tensor, shape: Any = None) -> Tensor:
        shape = like.shape if shape is None else shape
        buffer = torch.full([size + 2 for size in shape], 7.0).to(like.dtype)
        self.buffers.append(buffer)
        view = buffer.detach()[self.inside(buffer)]
        return view.fill_(float("nan"))

    @staticmethod
    def inside(buffer: Tensor) -> tuple[slice, ...]:
        return (slice(1, -1),) * buffer.dim()

    def untouched(self) -> bool:
        copies = [buffer.detach().clone() for buffer in self.buffers]
        for copy in copies:
            copy[self.inside(copy)] = 7.0
        return all((copy == 7.0).all() for copy in copies)


@every_level
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case", [CASES[0], Case("", len_q=33, len_k=65, value_dim=5, mask="float B1LS"), LONG[0]], ids=str
)
def test_nothing_beside_the_results_is_written(
    case: Case, dtype: torch.dtype, level: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make_inputs(case, dtype, "cpu", seed)
    plain = results(fused("cpu"), inputs)
    framed = Framed()
    monkeypatch.setattr(problem, "empty_in_order_of", framed)
    monkeypatch.setattr(native_cpu, "gradient_like", framed)
    for name, x in results(fused("cpu"), inputs).items():
        assert_equal_bits(x, plain[name], name)
    assert len(framed.buffers) == 4 + ("attn_mask" in inputs.options)
    assert framed.untouched()


@every_level
def test_another_thread_has_scratch_of_its_own(level: str, seed: int) -> None:
    import threading

    inputs = make_inputs(Case("", len_q=65, len_k=130, is_causal=True), torch.float32, "cpu", seed)
    alone = results(fused("cpu"), inputs)
    found: list[Results] = []
    workers = [threading.Thread(target=lambda: found.append(results(fused("cpu"), inputs))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 4
    for other in found:
        for name, x in other.items():
            assert_equal_bits(x, alone[name], name)

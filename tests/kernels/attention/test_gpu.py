"""The kernels on a GPU: every case in every dtype, tf32, torch.compile, CUDA graphs. Runs with pytest alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedformer.functional import attention, attention_with_kvcache
from tests.cases import CASES, Case, make_inputs
from tests.kernels.attention import caches, test_cuda
from tests.kernels.attention.caches import Cache, make_cache
from tests.kernels.attention.eager import assert_results_within_contract, fused, results
from tests.lanes import compiled
from tests.tolerances import assert_equal_bits, assert_no_mistake

pytestmark = pytest.mark.gpu

# What one tile, or the interpreter's patience, does not hold.
LONG = (
    Case("long", heads=3, len_q=1023, len_k=1025, head_dim=64, is_causal=True),
    Case("long padding", batch=4, len_q=577, head_dim=64, key_mask="bool", is_causal=True, dropout_p=0.1),
    Case("long bias", heads=4, len_q=512, head_dim=64, mask="float 1HLS"),
    Case("long grouped", heads=8, heads_kv=2, len_q=640, len_k=1000, head_dim=128, is_causal=True,
         causal_alignment="bottom_right"),
    Case("long window", len_q=1500, head_dim=80, window=(255, 0), layout="BLHE"),
    Case("long head", heads=1, len_q=300, head_dim=256, mask="bool BHLS"),
    Case("long mask 64 modulo 128", batch=1, len_q=192, head_dim=128, mask="bool LS"),
)  # fmt: skip
# More blocks than a GPU runs at a time.
VERY_LONG = (
    Case("very long", batch=2, heads=16, len_q=2049, head_dim=64, is_causal=True),
    Case("very long", batch=2, heads=16, heads_kv=4, len_q=2047, head_dim=128),
    Case("very long window", heads=16, len_q=3000, head_dim=128, window=(700, 0)),
)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def allow_tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, *LONG], ids=str)
def test_kernels_hold_the_contract(case: Case, dtype: torch.dtype, seed: int) -> None:
    inputs = make_inputs(case, dtype, "cuda", seed)
    assert_results_within_contract(results(fused("triton"), inputs), inputs)


@pytest.mark.parametrize("precision", [None, "tf32"])
@pytest.mark.parametrize("case", [CASES[0], *LONG], ids=str)
@pytest.mark.usefixtures("allow_tf32")
def test_tf32_holds_the_contract(case: Case, precision: str | None, seed: int) -> None:
    """Against eager products in tf32, by torch's setting or by name."""
    inputs = make_inputs(replace(case, precision=precision), torch.float32, "cuda", seed)
    assert_results_within_contract(results(fused("triton"), inputs), inputs)


@pytest.mark.usefixtures("allow_tf32")
def test_a_precision_given_overrides_torchs_setting(seed: int) -> None:
    inputs = make_inputs(LONG[0], torch.float32, "cuda", seed)
    tf32 = results(fused("triton"), inputs)
    torch.set_float32_matmul_precision("highest")
    for precision in ("ieee", "tf32x3"):
        actual = results(fused("triton", precision=precision), inputs)
        assert not torch.equal(actual["out"], tf32["out"])
        assert_results_within_contract(actual, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LONG, ids=str)
def test_same_bits_many_times(case: Case, dtype: torch.dtype, seed: int) -> None:
    """flash-attention#2244: a gradient of the query that differs now and then."""
    inputs = make_inputs(case, dtype, "cuda", seed)
    first = results(fused("triton"), inputs)
    for _ in range(5):
        for name, x in results(fused("triton"), inputs).items():
            assert_equal_bits(x, first[name], name)


@compiled
@pytest.mark.parametrize("dtype", test_cuda.DTYPES, ids=str)
@pytest.mark.parametrize("case", [case for case in (*LONG, *VERY_LONG) if test_cuda.is_taken(case)], ids=str)
def test_cuda_kernels_hold_the_contract_many_times(case: Case, dtype: torch.dtype, seed: int) -> None:
    """Blocks wait for each other's parts of the query's gradient: the same bits, however they are scheduled."""
    inputs = make_inputs(case, dtype, "cuda", seed)
    first = results(fused("cuda"), inputs)
    assert_results_within_contract(first, inputs)
    for _ in range(10):
        for name, x in results(fused("cuda"), inputs).items():
            assert_equal_bits(x, first[name], name)


@compiled
def test_cuda_kernels_in_a_graph(seed: int) -> None:
    inputs = make_inputs(LONG[0], torch.bfloat16, "cuda", seed)
    leaves, named = inputs.leaves()
    tensors = list(named.values())

    def step() -> tuple[Tensor, ...]:
        out = attention(leaves.query, leaves.key, leaves.value, **leaves.options, backend="cuda")
        return out, *torch.autograd.grad(out, tensors, inputs.grad_out)

    expected = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        for x in captured:
            x.fill_(float("nan"))
        graph.replay()
        for actual, right in zip(captured, expected, strict=True):
            assert_equal_bits(actual, right)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_is_the_references(dtype: torch.dtype, seed: int) -> None:
    inputs = make_inputs(Case("", len_q=130, len_k=257, dropout_p=0.4), dtype, "cuda", seed)
    ours, reference = (results(fused(backend), inputs) for backend in ("triton", "reference"))
    for name, x in ours.items():
        assert_no_mistake(x, reference[name].double(), name)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_compiled_with_inductor(mode: str | None, seed: int) -> None:
    inputs = make_inputs(LONG[1], torch.bfloat16, "cuda", seed)
    compiled = torch.compile(fused("triton"), fullgraph=True, mode=mode)
    expected = results(fused("triton"), inputs)
    for _ in range(3):
        for name, x in results(compiled, inputs).items():
            assert_equal_bits(x, expected[name], name)


def test_cuda_graph_of_forward_and_backward(seed: int) -> None:
    """Nothing on the way asks the host, so that it can be captured; replays read new inputs and draw new masks."""
    inputs = make_inputs(LONG[1], torch.float16, "cuda", seed)
    leaves, named = inputs.leaves()
    options: dict[str, Any] = {name: x for name, x in leaves.options.items() if name != "seed"}
    tensors = list(named.values())

    def step() -> tuple[Tensor, ...]:
        out = attention(leaves.query, leaves.key, leaves.value, **options, backend="triton")
        return out, *torch.autograd.grad(out, tensors, inputs.grad_out)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    first = [x.clone() for x in captured]
    graph.replay()
    assert not torch.equal(captured[0], first[0]), "a replay draws a new dropout mask"
    with torch.no_grad():
        leaves.value.zero_()
    graph.replay()
    assert (captured[0] == 0).all()
    assert all(x.isfinite().all() for x in captured)


def test_a_stream_of_its_own(seed: int) -> None:
    inputs = make_inputs(LONG[0], torch.float16, "cuda", seed)
    expected = results(fused("triton"), inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        actual = results(fused("triton"), inputs)
    stream.synchronize()
    for name, x in actual.items():
        assert_equal_bits(x, expected[name], name)


def test_memory_is_linear_in_the_length() -> None:
    """Nothing of size L x S: 4096 x 4096 scores of two heads would be 128 MiB in float32."""
    query, key, value = (
        torch.randn(1, 2, 4096, 64, device="cuda", dtype=torch.float16, requires_grad=True) for _ in range(3)
    )
    attention(query, key, value, is_causal=True, backend="triton").sum().backward()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attention(query, key, value, is_causal=True, backend="triton").sum().backward()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 16 * query.nbytes


@pytest.mark.parametrize("index", range(2))
def test_a_device_that_is_not_the_current_one(index: int, seed: int) -> None:
    if index >= torch.cuda.device_count():
        pytest.skip("needs two GPUs")
    inputs = make_inputs(LONG[0], torch.float16, f"cuda:{index}", seed)
    assert_results_within_contract(results(fused("triton"), inputs), inputs)


LONG_CACHES: dict[str, dict[str, Any]] = {
    "long": {"lengths": [8191, 0, 1, 5000], "slots": 8192, "heads": 32, "heads_kv": 8, "head_dim": 128},
    "one long sequence": {"lengths": [30000], "slots": 32768, "heads": 8, "heads_kv": 1, "head_dim": 64},
    "many sequences": {"lengths": [*range(0, 900, 9)], "slots": 1024, "heads": 16, "heads_kv": 8, "head_dim": 72},
    "a long window": {"lengths": [4000, 70], "slots": 4096, "len_q": 7, "window": (1000, None), "head_dim": 256},
    "a long prompt": {"lengths": [0, 700], "slots": 2048, "len_q": 600, "heads": 4, "head_dim": 64},
}


CACHES = [
    *((name, None, torch.bfloat16) for name in caches.CASES),
    *((name, None, dtype) for name in LONG_CACHES for dtype in DTYPES),
    *((name, page, torch.bfloat16) for name in ("long", "a long window", "odd head dims") for page in (7, 16, 256)),
]


@compiled
@pytest.mark.parametrize(("name", "page", "dtype"), [x for x in CACHES if x[2] != torch.float32], ids=str)
def test_a_cache_holds_the_contract_by_cuda(name: str, page: int | None, dtype: torch.dtype, seed: int) -> None:
    cache = make_cache(**(caches.CASES | LONG_CACHES)[name], dtype=dtype)
    if max(cache.query.size(3), cache.value_cache.size(3)) > 256 or cache.value_cache.size(3) % 8:
        pytest.skip("a head dim that the kernels do not take")
    used = (cache.copy() if page is None else cache.paged(page)).to("cuda")
    caches.assert_right(*used("cuda"), cache.to("cuda"))


@pytest.mark.parametrize(("name", "page", "dtype"), CACHES, ids=str)
def test_a_cache_holds_the_contract(name: str, page: int | None, dtype: torch.dtype, seed: int) -> None:
    cache = make_cache(**(caches.CASES | LONG_CACHES)[name], dtype=dtype)
    used = (cache.copy() if page is None else cache.paged(page)).to("cuda")
    caches.assert_right(*used("triton"), cache.to("cuda"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cache_with_alibi_and_sinks(dtype: torch.dtype, seed: int) -> None:
    cache = make_cache([3000], slots=4096, len_q=2, dtype=dtype).to("cuda")
    cache.options |= {"alibi_slopes": torch.rand(1, 4, device="cuda"), "sinks": torch.randn(4, device="cuda")}
    caches.assert_right(*cache.copy()("triton"), cache)


@pytest.mark.parametrize("seqlens_dtype", [torch.int32, torch.int64], ids=str)
def test_same_bits_many_times_over_a_cache(seqlens_dtype: torch.dtype) -> None:
    cache = make_cache(**LONG_CACHES["long"], dtype=torch.bfloat16).to("cuda")
    cache.cache_seqlens = cache.cache_seqlens.to(seqlens_dtype)
    first = cache.copy()("triton")
    for _ in range(5):
        for x, expected in zip(cache.copy()("triton"), first, strict=True):
            assert_equal_bits(x, expected)


@pytest.mark.parametrize("page", [None, 16])
def test_cuda_graph_of_decoding(page: int | None) -> None:
    """A captured step appends, attends and advances: replays are the steps that follow, and nothing asks the host."""
    steps, lengths = 6, [40, 1000]
    new = make_cache(lengths, slots=1200, len_q=steps, heads=8, heads_kv=2, head_dim=64, dtype=torch.bfloat16)
    start = (new.copy() if page is None else new.paged(page)).to("cuda")
    new = new.to("cuda")

    def attend(cache: Cache, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        table = start.options.get("block_table")
        tensors = (query, cache.key_cache, cache.value_cache, cache.cache_seqlens)
        out: Tensor = caches.call(*tensors, key=key, value=value, block_table=table, backend="triton")
        cache.cache_seqlens += 1
        return out

    def inputs(step: int) -> tuple[Tensor, Tensor, Tensor]:
        tensors = (new.query, new.options["key"], new.options["value"])
        return tuple(x[:, :, step : step + 1].contiguous() for x in tensors)  # type: ignore[return-value]

    def fresh() -> Cache:
        cache = start.copy()
        cache.cache_seqlens = cache.cache_seqlens.clone()
        return cache

    eager = fresh()
    expected = [attend(eager, *inputs(step)) for step in range(steps)]
    cache, static = fresh(), inputs(0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        attend(fresh(), *static)  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(cache, *static)
    for step in range(steps):
        for x, given in zip(static, inputs(step), strict=True):
            x.copy_(given)
        graph.replay()
        assert_equal_bits(out, expected[step])
    assert torch.equal(cache.cache_seqlens, eager.cache_seqlens)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_a_cache_compiled_with_inductor(mode: str | None) -> None:
    cache = make_cache([40, 1000], slots=1200, heads=8, heads_kv=2, head_dim=64, dtype=torch.bfloat16).to("cuda")
    expected = cache.copy()
    out = expected("triton")[0]
    compiled = torch.compile(attention_with_kvcache, fullgraph=True, mode=mode)
    for _ in range(3):
        tensors = (cache.query, cache.key_cache, cache.value_cache, cache.cache_seqlens)
        assert_equal_bits(compiled(*tensors, **cache.options, backend="triton"), out)
        for b, length in enumerate(cache.cache_seqlens.tolist()):
            assert_equal_bits(cache.key_cache[b, :, : length + 1], expected.key_cache[b, :, : length + 1])

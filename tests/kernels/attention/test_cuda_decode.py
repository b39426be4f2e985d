"""The CUDA kernel over a cache, run on the host by the emulator of ``csrc/cuda/emulator``, against float64; and the
emulation of what it is made of: fragments by Triton's account of them, and the mistakes that copies allow."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import POINTER, byref, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedformer.kernels.common.device import TRITON_INSTALLED
from tests.cases import GUARD
from tests.kernels.attention import caches
from tests.kernels.attention.caches import Cache, assert_right, make_cache
from tests.kernels.attention.emulator import DTYPES, Tensor4, guarded, message
from tests.lanes import emulated
from tests.tolerances import assert_equal_bits

pytestmark = emulated
INF, NAN = float("inf"), float("nan")


class DecodeStruct(ctypes.Structure):
    """``DecodeProblem`` of ``csrc/cuda/problem.h``."""

    _fields_ = [
        *((name, Tensor4) for name in ("q", "key_cache", "value_cache", "new_key", "new_value", "out")),
        *((name, c_void_p) for name in ("lse", "cache_seqlens", "block_table")),
        ("table_stride", c_int64),
        *((name, c_int) for name in ("pages", "page")),
        ("alibi_slopes", c_void_p),
        *((name, c_int64) for name in ("slopes_batch_stride", "slopes_head_stride")),
        ("sinks", c_void_p),
        ("sinks_head_stride", c_int64),
        *((name, c_int) for name in ("batch", "heads", "heads_kv", "len_q", "appended", "head_dim", "value_dim")),
        ("bf16", c_bool),
        *((name, c_float) for name in ("scale", "softcap")),
        *((name, c_int64) for name in ("window_left", "window_right")),
        ("workspace", c_void_p),
    ]


Decode = Callable[..., tuple[Tensor, Tensor]]


@pytest.fixture
def library(emulator: ctypes.CDLL) -> ctypes.CDLL:
    emulator.check_attention_decode.argtypes = [POINTER(DecodeStruct), c_int]
    emulator.check_attention_decode_workspace.argtypes = [POINTER(DecodeStruct), c_int]
    emulator.check_attention_decode_workspace.restype = c_size_t
    emulator.check_fragments.argtypes = [c_void_p, c_void_p, c_void_p, c_bool]
    emulator.check_matrices.argtypes = [c_void_p, c_void_p, c_bool]
    emulator.check_copies.argtypes = [c_void_p, c_void_p, c_int]
    for name in ("check_attention_decode", "check_fragments", "check_matrices", "check_copies"):
        getattr(emulator, name).restype = c_char_p
    return emulator


def struct_of(cache: Cache, out: Tensor, lse: Tensor) -> DecodeStruct:
    query, options = cache.query, cache.options
    table = options.get("block_table")
    slopes, sinks = options.get("alibi_slopes"), options.get("sinks")
    left, right = (-1 if side is None else side for side in options.get("window", (None, None)))
    p = DecodeStruct(*map(Tensor4.of, (query, cache.key_cache, cache.value_cache)))
    p.out, p.lse, p.cache_seqlens = Tensor4.of(out), lse.data_ptr(), cache.cache_seqlens.data_ptr()
    p.pages, p.page = 1, cache.key_cache.size(2)
    p.batch, p.heads, p.len_q, p.head_dim = query.shape
    p.heads_kv, p.value_dim, p.appended = cache.value_cache.size(1), cache.value_cache.size(3), cache.new_slots
    p.bf16, p.scale = query.dtype == torch.bfloat16, options.get("scale", query.size(3) ** -0.5)
    p.softcap = options.get("softcap", 0.0)
    p.window_left, p.window_right = left, 0 if options.get("is_causal", True) else right
    if "key" in options:
        p.new_key, p.new_value = Tensor4.of(options["key"]), Tensor4.of(options["value"])
    if table is not None:
        p.block_table, p.table_stride, p.pages = table.data_ptr(), table.stride(0), table.size(1)
    if slopes is not None:
        p.alibi_slopes, p.slopes_head_stride = slopes.data_ptr(), slopes.stride(-1)
        p.slopes_batch_stride = slopes.stride(0) if slopes.dim() == 2 else 0
    if sinks is not None:
        p.sinks, p.sinks_head_stride = sinks.data_ptr(), sinks.stride(0)
    return p


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int16)


def appended(cache: Cache) -> list[Tensor]:
    """Both caches as they should be after the call, whose new keys go slot by slot."""
    after = [cache.key_cache.clone(), cache.value_cache.clone()]
    table, page = cache.options.get("block_table"), cache.key_cache.size(2)
    for b, length in enumerate(cache.cache_seqlens.tolist()):
        for i in range(cache.new_slots):
            slot = length + i
            block = b if table is None else table[b, slot // page]
            for x, name in zip(after, ("key", "value"), strict=True):
                x[block, :, slot % page] = cache.options[name][b, :, i]
    return after


@pytest.fixture
def decode(library: ctypes.CDLL) -> Decode:
    """``(out, lse)`` as on a GPU of so many processors."""

    def run(cache: Cache, processors: int = 3) -> tuple[Tensor, Tensor]:
        query = cache.query
        shape = (*query.shape[:3], cache.value_cache.size(3))
        results = guarded(query.new_empty(shape), torch.empty(shape[:3]))
        (_, out), (_, lse) = results
        struct = struct_of(cache, out, lse)
        size = library.check_attention_decode_workspace(byref(struct), processors)
        workspace = torch.full((size + 2 * GUARD,), 0xFF, dtype=torch.uint8)  # NaN
        struct.workspace = workspace.data_ptr() + GUARD
        expected = appended(cache)
        assert message(library.check_attention_decode(byref(struct), processors)) == ""
        assert (workspace[:GUARD] == 0xFF).all()
        assert (workspace[size + GUARD :] == 0xFF).all()
        for buffer, inner in results:
            assert buffer.isnan().sum() == buffer.numel() - inner.numel(), "a result is NaN, or was written outside"
        for x, wanted in zip((cache.key_cache, cache.value_cache), expected, strict=True):
            assert torch.equal(bits(x), bits(wanted)), "the cache is not what it was with the new keys behind it"
        return out, lse

    return run


def takes(options: dict[str, Any]) -> bool:
    return all(options.get(name, 8) % 8 == 0 and options.get(name, 8) <= 256 for name in ("head_dim", "head_dim_v"))


SHARED = {name: options for name, options in caches.CASES.items() if takes(options)}
CASES: dict[str, dict[str, Any]] = SHARED | {
    **{f"{n} queries": {"lengths": [50, 9], "len_q": n, "heads": 8, "head_dim": 64} for n in (2, 3, 4)},
    "33 queries": {"lengths": [47], "len_q": 33, "heads": 8, "head_dim": 128},
    "head dim 8": {"lengths": [33, 2], "head_dim": 8},
    "head dim 128": {"lengths": [129, 0, 61], "slots": 140, "head_dim": 128},
    "head dim 256": {"lengths": [129, 16], "slots": 140, "heads": 2, "heads_kv": 1, "head_dim": 256},
    "wider values": {"lengths": [70, 1], "head_dim": 40, "head_dim_v": 128},
    "narrower values": {"lengths": [70, 1], "head_dim": 256, "head_dim_v": 72},
    "window of one": {"lengths": [75, 0], "len_q": 2, "window": (0, 0), "head_dim": 64},
    "window past all": {"lengths": [75], "len_q": 3, "window": (9, 1 << 40), "is_causal": False, "append": False},
    "window before all": {"lengths": [4, 3], "len_q": 40, "window": (0, 0), "append": False},
    "far cap": {"lengths": [70, 5], "softcap": 50.0, "head_dim": 64},
    "slopes": {"lengths": [70, 0], "len_q": 3, "is_causal": False, "append": False},
    "sinks": {"lengths": [70, 0, 1], "len_q": 2, "append": False},
    "everything": {"lengths": [305], "slots": 330, "len_q": 2, "softcap": 3.0, "window": (250, 1), "is_causal": False},
}


def make(name: str, dtype: torch.dtype) -> Cache:
    cache = make_cache(**CASES[name], dtype=dtype)
    heads = cache.query.size(1)
    if name in ("slopes", "everything"):
        cache.options["alibi_slopes"] = torch.rand(heads) - 0.3
    if name in ("sinks", "everything"):
        cache.options["sinks"] = torch.randn(2 * heads)[::2]
    return cache


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_contract(name: str, dtype: torch.dtype, seed: int, decode: Decode) -> None:
    torch.manual_seed(seed)
    cache = make(name, dtype)
    assert_right(*decode(cache.copy()), cache)


@pytest.mark.parametrize("page", [1, 7, 16, 64, 256])
def test_pages(page: int, seed: int, decode: Decode) -> None:
    torch.manual_seed(seed)
    cache = make_cache([257, 0, 64], slots=300, len_q=2, head_dim=64, head_dim_v=128, dtype=torch.bfloat16)
    assert_right(*decode(cache.paged(page)), cache)


@pytest.mark.parametrize("processors", [1, 16, 1000])
@pytest.mark.parametrize("name", ["everything", "a long cache in pieces", "head dim 256", "33 queries"])
def test_pieces_change_nothing(name: str, processors: int, seed: int, decode: Decode) -> None:
    torch.manual_seed(seed)
    cache = make(name, torch.float16)
    assert_right(*decode(cache.copy(), processors), cache)


@pytest.mark.parametrize("schedule", [1, 2, 3])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_any_order_of_threads_gives_the_same_bits(
    head_dim: int, schedule: int, seed: int, decode: Decode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which warp runs first, and which copies land early, changes no result."""
    torch.manual_seed(seed)
    cache = make_cache([501, 0], slots=520, heads=3, heads_kv=1, len_q=2, head_dim=head_dim, dtype=torch.bfloat16)
    cache = cache.paged(16)
    expected = decode(cache.copy())
    monkeypatch.setenv("FUSEDFORMER_EMULATED_SEED", str(schedule))
    for x, y in zip(decode(cache.copy()), expected, strict=True):
        assert_equal_bits(x, y)


@pytest.mark.parametrize("page", [None, 64, 6])
def test_what_stands_before_the_window_is_not_read(page: int | None, seed: int, decode: Decode) -> None:
    """It may lie in pages that were given to others."""
    torch.manual_seed(seed)
    cache = make_cache([278, 37], slots=300, len_q=2, window=(130, None), head_dim=16, dtype=torch.half)
    right = cache.copy()
    for b, length in enumerate(cache.cache_seqlens.tolist()):
        cache.key_cache[b, :, : max(length - 130, 0)] = cache.value_cache[b, :, : max(length - 130, 0)] = NAN
    assert_right(*decode(cache if page is None else cache.paged(page)), right)


def test_slots_of_all_heads_side_by_side(seed: int, decode: Decode) -> None:
    """And NaN behind the features of each."""
    torch.manual_seed(seed)
    cache = make_cache([70, 31], len_q=3, head_dim=40, head_dim_v=64, dtype=torch.bfloat16)
    expected = decode(cache.copy())

    def apart(x: Tensor) -> Tensor:
        batch, heads, length, features = x.shape
        wider = x.new_full((batch, length, heads, features + 24), NAN)[..., :features]
        return wider.transpose(1, 2).copy_(x)

    cache.query, cache.key_cache, cache.value_cache = map(apart, (cache.query, cache.key_cache, cache.value_cache))
    cache.options |= {name: apart(cache.options[name]) for name in ("key", "value")}
    for x, y in zip(decode(cache), expected, strict=True):
        assert_equal_bits(x, y)


def test_slopes_of_each_sequence(seed: int, decode: Decode) -> None:
    torch.manual_seed(seed)
    cache = make_cache([70, 5], len_q=2, dtype=torch.half)
    slopes = torch.rand(4, 2).T
    cache.options["alibi_slopes"] = slopes
    results = decode(cache.copy())
    for b in range(2):
        cache.options["alibi_slopes"] = slopes[b].contiguous()
        for x, y in zip(results, decode(cache.copy()), strict=True):
            assert_equal_bits(x[b], y[b])


@pytest.mark.parametrize("slots", [0, 80])
def test_without_queries_or_without_keys(slots: int, decode: Decode) -> None:
    cache = make_cache([0, 0], slots=slots, append=False, len_q=2, dtype=torch.half)
    out, lse = decode(cache)
    assert (out == 0).all()
    assert (lse == -INF).all()
    cache = make_cache([5, slots // 2], slots=max(slots, 6), head_dim=64, dtype=torch.half)
    cache.query = cache.query[:, :, :0]
    if slots:
        decode(cache)  # appends


def pieces(library: ctypes.CDLL, batch: int, heads_kv: int, slots: int, processors: int) -> int:
    """Of one query of four heads for each key head."""
    p = DecodeStruct(batch=batch, heads=4 * heads_kv, heads_kv=heads_kv, len_q=1, head_dim=128, value_dim=128)
    p.pages, p.page = slots // 16, 16
    size: int = library.check_attention_decode_workspace(byref(p), processors)
    return max(size // (batch * 4 * heads_kv * (128 + 2) * 4), 1)


def test_every_processor_works_and_no_piece_is_idle(library: ctypes.CDLL) -> None:
    for processors in (108, 132):
        for batch, heads_kv, slots in ((1, 8, 4096), (1, 8, 32768), (1, 1, 65536), (4, 8, 8192), (16, 8, 8192)):
            blocks = batch * heads_kv * pieces(library, batch, heads_kv, slots, processors)
            waves = -(-blocks // (2 * processors))
            assert blocks >= 0.85 * waves * 2 * processors, (processors, batch, heads_kv, slots)
            assert blocks // batch // heads_kv <= slots // 64
    assert pieces(library, 1, 8, 64, 132) == pieces(library, 1, 8, 256, 132) == pieces(library, 64, 8, 32768, 132) == 1


# ---- the emulation


def layouts() -> list[Any]:
    """Of A (16, 16), B (16, 8) and D (16, 8), as Triton knows them: index bits of a lane's element and of the lane."""
    from triton._C.libtriton import gluon_ir, ir
    from triton.experimental.gluon.language._layouts import DotOperandLayout, NVMMADistributedLayout

    context = ir.context()
    ir.load_dialects(context)
    builder = gluon_ir.GluonOpBuilder(context)
    product = NVMMADistributedLayout(version=[2, 0], warps_per_cta=[1, 1], instr_shape=[16, 8])
    operands = [DotOperandLayout(operand_index=i, parent=product, k_width=2) for i in (0, 1)]
    shapes = ([16, 16], [16, 8], [16, 8])
    return [builder.to_linear_layout(x._to_ir(builder), s) for x, s in zip((*operands, product), shapes, strict=True)]


def places(layout: Any) -> Tensor:
    """(lanes, elements, 2): row and column."""
    bases = [*layout.reg_bases, *layout.lane_bases]  # those of elements are the lower bits
    numbers = torch.arange(1 << len(bases))
    at = sum((numbers >> i & 1)[:, None] * torch.tensor(base) for i, base in enumerate(bases))
    assert isinstance(at, Tensor)
    return at.view(32, -1, 2)


def gather(x: Tensor, layout: Any) -> Tensor:
    """(lanes, elements) of a matrix."""
    return x[places(layout).unbind(-1)].contiguous()


needs_triton = pytest.mark.skipif(not TRITON_INSTALLED, reason="Triton is not installed")


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fragments_are_those_that_triton_knows(dtype: torch.dtype, seed: int, library: ctypes.CDLL) -> None:
    torch.manual_seed(seed)
    of_a, of_b, of_d = layouts()
    a, b, d = (torch.randint(-8, 9, shape) for shape in ((16, 16), (16, 8), (16, 8)))  # every order of sums is exact
    fragments = [gather(a.to(dtype), of_a), gather(b.to(dtype), of_b), gather(d.float(), of_d)]
    error = library.check_fragments(*(x.data_ptr() for x in fragments), dtype == torch.bfloat16)
    assert message(error) == ""
    assert_equal_bits(fragments[2], gather((a @ b + d).float(), of_d))


@needs_triton
@pytest.mark.parametrize("transposed", [False, True])
def test_loads_of_matrices_give_such_fragments(transposed: bool, library: ctypes.CDLL) -> None:
    """A tile is an A operand; transposed on its way, it is two B operands of 8 columns each."""
    of_a, of_b, _ = layouts()
    tile, found = torch.arange(256, dtype=torch.int16).view(16, 16), torch.zeros(32, 8, dtype=torch.int16)
    assert message(library.check_matrices(tile.data_ptr(), found.data_ptr(), transposed)) == ""
    expected = torch.cat([gather(x, of_b) for x in tile.chunk(2, 1)], 1) if transposed else gather(tile, of_a)
    assert torch.equal(found, expected)


MISTAKES = {
    "none": "",
    "read without a wait": None,
    "read without a barrier": None,
    "overwritten without a barrier": None,
    "a copy that nobody waits for": "a copy to shared memory that nobody waited for",
    "a source at an odd place": "to 0 of shared memory, not multiples of 16",
    "a row at an odd place": "a row of ldmatrix that is not a multiple of 16",
    "a wait for all but the latest": None,
}


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes_with_copies_are_noticed(what: str, library: ctypes.CDLL) -> None:
    """By a message, or by a result that is wrong."""
    pattern, number = MISTAKES[what], list(MISTAKES).index(what)
    source, result = torch.arange(260.0), torch.full((2, 32), NAN)
    skip = -source.data_ptr() % 16 // 4
    source = source[skip : skip + 257]
    error = message(library.check_copies(source.data_ptr(), result.data_ptr(), number))
    right = torch.equal(result, source[:256].view(2, 32, 4)[:, :, 0].roll(-1, 1))
    if pattern:
        assert pattern in error
    else:
        assert right == (pattern == "")
        assert error == "" or not right

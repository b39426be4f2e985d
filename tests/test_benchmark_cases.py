"""What the benchmark measures is declared and counted right: cases and their floors, work, traffic, ceilings."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import ceilings
from benchmarks.cases import (
    ATTENTION,
    DIRECTIONS,
    MINIATURES,
    AttentionCase,
    flops,
    moved_bytes,
    selected,
    visible_pairs,
)
from benchmarks.ceilings import Ceilings, measure_ceilings
from benchmarks.options import Options
from benchmarks.timing import threads_set_to
from fusedformer.kernels.common import native

CEILINGS = Ceilings("cpu", 1, 1e10, {"fp32": 1e11, "fp16": 1e9, "bf16": 2e11})
NEEDS_EXTENSION = pytest.mark.skipif(native.EXTENSION.path is None, reason="the native extension is not built")
TINY = AttentionCase("fp32", 1, 2, 16, 8, is_causal=True)


def test_cases_are_distinct_and_of_sound_shape() -> None:
    for device_type in ("cpu", "cuda"):
        everything = selected(Options(device_type, full=True))
        assert len({case.name for case in everything}) == len(everything) > len(selected(Options(device_type))) > 10
    for case in (*ATTENTION, *MINIATURES):
        assert case.floor is None or case.floor > 0.0, case.name
        assert case.floor is not None or case.read_floor is None, case.name
        assert case.heads % (case.heads_kv or case.heads) == 0, case.name
        assert not case.is_causal or case.len_k is None, case.name
        assert case.batch > 1 or not case.key_padding, case.name


# dtype, direction, features, lengths of the keys, head dims, and the ratio to SDPA; H=8 but for decoding.
FLOORS = [
    ("bf16", "forward", "dense", (128, 256, 512, 1024, 2048, 4096), (64,), 2.8),
    ("bf16", "forward", "dense", (128, 256, 512, 1024, 2048, 4096), (128,), 2.0),
    ("bf16", "forward", "causal", (128, 256, 512), (64,), 3.5),
    ("bf16", "forward", "causal", (128, 256, 512), (128,), 2.5),
    ("bf16", "forward", "causal", (1024, 2048, 4096), (64,), 3.2),
    ("bf16", "forward", "causal", (1024, 2048, 4096), (128,), 2.3),
    ("bf16", "forward", "padding", (128, 512, 2048), (64, 128), 2.5),
    ("bf16", "forward+backward", "causal", (128, 256, 512), (64, 128), 4.0),
    ("bf16", "forward+backward", "causal", (2048,), (64, 128), 2.5),
    ("fp32", "forward", "causal", (128, 256, 512), (64, 128), 2.0),
    ("fp32", "forward", "dense", (1024, 2048, 4096), (64, 128), 1.8),
    ("fp32", "forward+backward", "causal", (512, 2048), (64, 128), 1.8),
    ("fp16", "forward", "dense", (512, 1024, 2048, 4096), (64, 128), 2.5),
    ("fp16", "forward", "causal", (512, 1024, 2048, 4096), (64, 128), 2.5),
    ("bf16", "forward", "decode", (4096,), (128,), 2.6),
    *((dtype, "forward", "dense", (512,), (32, 40, 80, 96, 256), 1.2) for dtype in ("bf16", "fp16", "fp32")),
    *((dtype, "forward", "causal", (127, 333, 1023), (64,), 1.2) for dtype in ("bf16", "fp16", "fp32")),
    *((dtype, "forward+backward", "causal", (333,), (32, 40, 80, 96, 256), 1.2) for dtype in ("bf16", "fp16", "fp32")),
    *((dtype, "forward", "dense", (1, 2, 4, 8, 16), (64,), 0.8) for dtype in ("bf16", "fp16", "fp32")),
]


def test_every_floor_stands_and_no_other() -> None:
    found: dict[tuple[object, ...], set[float]] = {}
    for case in selected(Options("cpu", full=True)):
        length = case.len_k or case.len_q
        if case.floor is not None:
            found.setdefault((case.dtype, case.direction, case.features, length, case.head_dim), set()).add(case.floor)
            assert (case.heads, case.heads_kv) == ((32, 8) if case.is_decode else (8, None))
            assert (case.batch, case.read_floor) in ([(1, 0.8), (8, 0.8)] if case.is_decode else [(1, None), (4, None)])
    expected = {
        (dtype, direction, features, length, head_dim): {floor}
        for dtype, direction, features, lengths, head_dims, floor in FLOORS
        for length in lengths
        for head_dim in head_dims
    }
    assert found == expected


def test_floors_select_every_case_that_has_one() -> None:
    found = selected(Options("cpu", floors=True))
    assert found == [case for case in selected(Options("cpu", full=True)) if case.floor is not None]
    assert any(case.full for case in found)


def test_padding_empties_half_of_every_second_row() -> None:
    inputs = AttentionCase("fp32", 4, 2, 7, 8, key_padding=True).inputs("cpu")
    assert inputs.options["key_mask"].sum(dim=1).tolist() == [7, 3, 7, 3]


def test_selection_is_by_name() -> None:
    assert {case.dtype for case in selected(Options("cpu", full=True, pattern="^bf16.*causal"))} == {"bf16"}
    assert selected(Options("cpu", full=True, pattern="no such case")) == []
    assert len(selected(Options("cpu", quick=True))) == len(MINIATURES)


@pytest.mark.parametrize(
    ("given", "message"),
    [({"dtype": "fp8"}, "dtype: got 'fp8'"), ({"direction": "up"}, "direction: got 'up'")],
)
def test_a_bad_case_is_refused(given: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "case",
    [
        TINY,
        AttentionCase("fp32", 3, 2, 7, 8, key_padding=True),
        AttentionCase("fp32", 3, 4, 9, 8, heads_kv=2, is_causal=True, key_padding=True),
        AttentionCase("fp32", 1, 2, 3, 8, len_k=11),
    ],
    ids=lambda case: case.name,
)
def test_visible_pairs_are_those_of_the_mask_written_out(case: AttentionCase) -> None:
    inputs = case.inputs("cpu")
    visible = torch.ones(case.batch, case.heads, case.len_q, inputs.key.size(2), dtype=torch.bool)
    if case.is_causal:
        visible = visible.tril()
    if case.key_padding:
        visible = visible & inputs.options["key_mask"][:, None, None]
    assert visible_pairs(inputs) == int(visible.sum())


def test_work_is_counted_by_formula() -> None:
    case = AttentionCase("bf16", 2, 4, 5, 8, heads_kv=2, len_k=7)
    inputs = case.inputs("cpu")
    forward = 4 * 2 * 4 * 5 * 7 * 8
    query, key, value, out = 2 * 4 * 5 * 8, 2 * 2 * 7 * 8, 2 * 2 * 7 * 8, 2 * 4 * 5 * 8
    expected_bytes = {
        "forward": 2 * (query + key + value + out),
        "backward": 2 * (2 * (query + key + value) + 2 * out),
    }
    expected_bytes["forward+backward"] = sum(expected_bytes.values())
    assert [flops(inputs, d) for d in DIRECTIONS] == [forward, 2.5 * forward, 3.5 * forward]
    assert {d: moved_bytes(inputs, d) for d in DIRECTIONS} == expected_bytes


def test_a_float_mask_is_read_and_its_gradient_written() -> None:
    plain = AttentionCase("fp32", 2, 2, 5, 8)
    biased = replace(plain, mask="float 1HLS")
    mask = 4 * 2 * 5 * 5
    difference = [moved_bytes(biased.inputs("cpu"), d) - moved_bytes(plain.inputs("cpu"), d) for d in DIRECTIONS]
    assert difference == [mask, 2 * mask, 3 * mask]


def test_shares_are_of_each_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    assert CEILINGS.shares("bf16", 2.0, 1e11, 1e10, 1) == {"matmul": 0.25, "copy": 0.5}
    assert CEILINGS.shares("fp16", 1.0, 5e10, 0.0, 1)["matmul"] == 0.5  # computed in fp32, it need not be slower
    native_ones = replace(CEILINGS, level="amx", units={"AMX": 1e12, "FMA": 1e11})
    monkeypatch.setattr(ceilings, "read_rate", lambda working_set, threads, level: 1e9 * working_set)
    assert native_ones.shares("bf16", 1.0, 1e11, 1e9, 4) == {"AMX": 0.1, "FMA": 1.0, "read": 0.25}
    # Of as much as was read in half the time, between the timings, not of reading it again and again.
    assert native_ones.shares("bf16", 1.0, 1e11, 1e9, int(1e9), 0.5)["read"] == 0.5


def test_ceilings_are_measured() -> None:
    found = measure_ceilings("cpu", quick=True)
    assert found.matmul.keys() == {"fp32", "fp16", "bf16"}
    assert all(1e6 < rate < 1e15 for rate in (found.bandwidth, *found.matmul.values()))
    if native.EXTENSION.path is None:
        assert (found.level, found.units, found.read) == ("", {}, None)
        return
    assert found.level == native.level()
    assert found.units.keys() == {"FMA", *(unit.upper() for unit in ceilings.BFLOAT16_UNITS.get(found.level, ()))}
    assert found.read is not None


@NEEDS_EXTENSION
def test_native_ceilings_are_those_of_a_processor() -> None:
    with threads_set_to(1):
        for level, refusal in native.levels().items():
            if refusal is None:
                with native.use_level(level):
                    rate = torch.ops.fusedformer_native.cpu_ceiling
                    assert 1e9 < rate("fma", 0) < 1e12, level
                    for unit in ceilings.BFLOAT16_UNITS.get(level, ()):
                        assert 1e9 < rate(unit, 0) < 1e14, level
                    assert 1e9 < rate("read", 1 << 20) < 1e13, level
                    assert rate("read", 64) > 0.0, level  # less than any loop reads at once


@NEEDS_EXTENSION
def test_tensors_are_read_whole() -> None:
    for threads in (1, 2):
        with threads_set_to(threads):
            tensors = [torch.randn(257, 1000).T, torch.randn(64).bfloat16()]
            assert CEILINGS.reading(tensors) == {}  # which have no native units
            read = replace(CEILINGS, units={"FMA": 1e11}).reading(tensors)[ceilings.READ].call()
            assert isinstance(read, int)
            given = sum(x.nbytes for x in tensors)
            assert given - 2 * threads * 1024 <= read <= given  # but for what is less than a loop reads
    with pytest.raises(ValueError, match="tensors: got one that is not contiguous or not of bytes"):
        torch.ops.fusedformer_native.cpu_read([torch.randn(3)])


@NEEDS_EXTENSION
def test_a_ceiling_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="kind: got nonsense, expected one of fma, dot, amx, read"):
        torch.ops.fusedformer_native.cpu_ceiling("nonsense", 0)
    with native.use_level("portable"), pytest.raises(ValueError, match="level portable"):
        torch.ops.fusedformer_native.cpu_ceiling("amx", 0)

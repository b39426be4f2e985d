"""The benchmark of whole layers and models: what it declares, judges, counts and times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import case_tables, models
from benchmarks.ceilings import Ceilings
from benchmarks.model_cases import MINIATURES, MODELS, ModelCase, selected
from benchmarks.options import Options
from benchmarks.rows import OURS, TransformerRow
from fusedformer import nn

CEILINGS = Ceilings("cpu", 1, 1e10, {"fp32": 1e11, "fp16": 1e9, "bf16": 2e11})
QUICK = Options("cpu", quick=True)
TINY = MINIATURES[0]


def test_cases_are_distinct_and_selected_by_name() -> None:
    for device_type in ("cpu", "cuda"):
        everything = selected(Options(device_type, full=True))
        assert len({case.name for case in everything}) == len(everything) > 1
    assert [case.name for case in selected(Options("cpu", quick=True, pattern="encoder"))] == [TINY.name]
    floors = selected(Options("cpu", floors=True))
    assert floors
    assert all(case.asks_for_something for case in floors)


def test_every_floor_stands() -> None:
    stated = {case.name: (case.floor, case.read_floor, case.peak_most) for case in MODELS if "cpu" in case.devices}
    expected: dict[str, tuple[float | None, ...]] = {
        f"{kind}_layer-training_step-B8-L{length}-d512-{dtype}": floors
        for kind in ("encoder", "decoder")
        for length, dtype, floors in (
            (256, "fp32", (1.5, None, None)),
            (256, "bf16", (1.5, None, None)),
            (512, "fp32", (None, None, 0.6)),
        )
    }
    expected |= {
        "seq2seq_base-training_step-B8-L128+128-bf16": (1.3, None, None),
        "seq2seq_base-decoding_step-B1-cached128-bf16": (None, 0.7, None),
    }
    for dtype in ("fp32", "bf16"):
        for batch in (1, 16):
            expected[f"gpt2_ours-generation-B{batch}-16+64-{dtype}"] = (1.3, None, None)
        for variant, floor in (("ours", 1.5), ("fused", 1.15)):
            expected[f"smollm2_{variant}-generation-B1-256+128-{dtype}"] = (floor, None, None)
    assert {name: floors for name, floors in stated.items() if floors != (None, None, None)} == expected


@pytest.mark.parametrize("case", MINIATURES, ids=lambda case: case.name)
def test_a_right_result_is_timed_next_to_its_stock_equal(case: ModelCase) -> None:
    rows = models.transformer_rows(case, QUICK, [CEILINGS])
    assert [row.peer for row in rows] == list(case.workload.peers)
    ours = rows[0]
    assert {row.status for row in rows} == {"ok"}, ours.reason
    assert ours.within_contract
    assert ours.timing is not None
    if len(rows) > 1:
        assert ours.ratio is not None
        assert ours.best_peer == case.workload.peers[1]
    assert (ours.peak_share is None) == (case.peak_most is None)
    (table,) = case_tables.transformer_tables(rows)
    assert len(table.rows) == 1
    assert len(table.rows[0]) == len(table.columns)


@pytest.mark.parametrize("wrong", [lambda x: x * 1.01, lambda x: x * float("nan")])
def test_a_wrong_result_is_not_timed(wrong: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(nn.TransformerEncoderLayer):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return wrong(super().forward(*args, **kwargs))

    monkeypatch.setattr(nn, "TransformerEncoderLayer", Wrong)
    ours, stock = models.transformer_rows(TINY, QUICK, [CEILINGS])
    assert ours.status == "wrong"
    assert ours.timing is None
    assert ours.ratio is None
    assert stock.timing is not None


def test_what_takes_the_stock_equal_too_long_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelCase, "seconds", lambda case, device: 1000.0)
    rows = models.transformer_rows(TINY, Options("cpu"), [CEILINGS])
    assert {row.status for row in rows} == {"not run"}
    assert {row.reason for row in rows} == {"torch.nn would take 1000 s a call here"}
    assert not rows[0].met
    assert len(case_tables.transformer_tables(rows)) == 1


def test_work_is_counted_by_formula() -> None:
    workload = TINY.workload
    assert workload.tokens == 18
    assert workload.flops == 3 * 2 * 18 * (4 * 16 * 16 + 2 * 16 * 24 + 2 * 9 * 16)


def test_memory_can_be_a_floor_too() -> None:
    row = TransformerRow("a", OURS, "fp32", "training step", "f", 1, 1.0, 0, "out", peak_most=0.6)
    assert not row.met
    assert replace(row, peak_share=0.6).met
    assert not replace(row, peak_share=0.61).met
    both = replace(row, peak_share=0.5, floor=1.5, level="avx2")
    assert replace(both, ratio=1.5).met
    assert not replace(both, ratio=1.4).met


def test_both_modules_of_a_layer_have_the_same_weights() -> None:
    step: Any = TINY.workload
    ours, stock = step._modules(0.1).values()
    for name, parameter in stock.named_parameters():
        assert torch.equal(ours.get_parameter(name), parameter)

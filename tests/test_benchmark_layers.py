"""The benchmark of the feed-forward network and the norms: what it declares, judges, counts and times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor

from benchmarks import case_tables, layers
from benchmarks.ceilings import Ceilings
from benchmarks.layer_cases import FEED_FORWARD, LAYER_NORM, LAYERS, MINIATURES, LayerCase, selected
from benchmarks.memory import kept_bytes
from benchmarks.options import Options
from benchmarks.rows import OURS, LayerRow
from fusedformer import functional
from tests.kernels.feed_forward.cases import KINK

CEILINGS = Ceilings("cpu", 1, 1e10, {"fp32": 1e11, "fp16": 1e9, "bf16": 2e11})
TRAINING = "forward+backward"
TINY = LayerCase(FEED_FORWARD, "fp32", 17, 16, 40, "relu", direction=TRAINING)

# dtype, direction, activations, tokens, widths, least ratio
FLOORS = [
    ("bf16", "forward", ("relu", "gelu"), (128, 512, 2048), ("512/2048", "1024/4096"), 1.3),
    ("bf16", "forward", ("gelu_tanh",), (128, 512, 2048), ("256/1024",), 2.0),
    ("fp32", "forward", ("relu", "gelu"), (128, 512, 2048), ("512/2048", "1024/4096"), 1.6),
    ("fp32", TRAINING, ("relu", "gelu"), (128, 512, 2048), ("512/2048", "1024/4096"), 1.4),
    ("bf16", TRAINING, ("relu", "gelu"), (128, 512, 2048), ("512/2048", "1024/4096"), 1.3),
    *((dtype, "forward", ("relu",), (1,), ("512/2048", "1024/4096"), 0.95) for dtype in ("bf16", "fp32")),
]


@pytest.fixture
def _without_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes longer than all else here."""
    whole = layers.peers_of
    monkeypatch.setattr(layers, "peers_of", lambda case: whole(case)[:2])


def test_every_floor_stands() -> None:
    cases = {
        (case.dtype, case.direction, case.activation, case.tokens, case.width): case
        for case in LAYERS
        if case.operation == FEED_FORWARD and case.devices == ("cpu",) and not (case.gated or case.dropout_p)
    }
    stated = {
        (dtype, direction, activation, tokens, width): floor
        for dtype, direction, activations, lengths, widths, floor in FLOORS
        for activation in activations
        for tokens in lengths
        for width in widths
    }
    assert {key: case.floor for key, case in cases.items() if case.floor is not None} == stated
    assert {case.read_floor for key, case in cases.items() if key[3] == 1} == {0.8}
    kept = {(case.dtype, case.recompute): case.kept_most for case in LAYERS if case.kept_most is not None}
    assert kept == {(dtype, again): 0.2 if again else 0.5 for dtype in ("bf16", "fp32") for again in (False, True)}
    assert {case.floor for case in LAYERS if case.operation == LAYER_NORM and case.floor is not None} == {2.0}


def test_cases_are_distinct_and_selected_by_name() -> None:
    for device_type in ("cpu", "cuda"):
        everything = selected(Options(device_type, full=True))
        assert len({case.name for case in everything}) == len(everything) > 5
    assert [case.operation for case in selected(Options("cpu", quick=True, pattern="norm"))] == [LAYER_NORM]
    assert all(case.floor is not None for case in selected(Options("cpu", floors=True)))


@pytest.mark.parametrize("name", ["operation", "dtype", "direction"])
def test_a_bad_case_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: got 'no', expected one of"):
        LayerCase(**{**asdict(TINY), name: "no"})


def test_work_is_counted_by_formula() -> None:
    inputs = TINY.inputs("cpu")
    assert replace(TINY, direction="forward").flops == 2 * 2 * 17 * 16 * 40
    assert TINY.flops == 3 * 2 * 2 * 17 * 16 * 40
    read = 4 * (17 * 16 + 2 * 16 * 40 + 40 + 16)
    assert TINY.moved_bytes(inputs) == 3 * read + 2 * 4 * 17 * 16
    assert replace(TINY, direction="forward").moved_bytes(inputs) == read + 4 * 17 * 16


def test_no_pre_activation_is_at_the_kink() -> None:
    case = replace(TINY, tokens=512, d_ff=512)
    tensors = case.inputs("cpu").to(torch.float64).tensors
    assert (tensors["input"] @ tensors["weight1"].mT + tensors["bias1"]).abs().min() >= KINK


def test_kept_bytes_are_what_backward_needs() -> None:
    x, weight = torch.randn(8, 16, requires_grad=True), torch.randn(8, 16, requires_grad=True)
    given = (x, weight)
    assert kept_bytes(lambda: x * weight, given) == 0
    assert kept_bytes(lambda: (x * weight).relu(), given) == 4 * 8 * 16
    assert kept_bytes(lambda: (x * weight).exp() * weight, given) == 4 * 8 * 16
    assert kept_bytes(lambda: x @ weight.mT, given) == 0  # a view of what is given


@pytest.mark.usefixtures("_without_compilation")
@pytest.mark.parametrize("case", MINIATURES, ids=lambda case: case.name)
def test_a_right_result_is_timed_next_to_its_peers(case: LayerCase) -> None:
    rows = layers.layer_rows(case, Options("cpu", quick=True), [CEILINGS])
    assert [row.peer for row in rows] == [OURS, "eager"]
    ours = rows[0]
    assert {row.status for row in rows} == {"ok"}
    assert ours.within_contract
    assert ours.ratio is not None
    assert ours.best_peer == "eager"
    assert (ours.kept_share is None) == (case.direction == "forward")
    (table,) = case_tables.layer_tables(rows)
    assert len(table.rows) == 1
    assert len(table.rows[0]) == len(table.columns)


@pytest.mark.usefixtures("_without_compilation")
@pytest.mark.parametrize("case", [TINY, MINIATURES[-1]], ids=lambda case: case.name)
@pytest.mark.parametrize("wrong", [lambda x: x * 1.001, lambda x: x + 1e-3, lambda x: x * float("nan")])
def test_a_wrong_result_is_not_timed(
    case: LayerCase, wrong: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = case.ours
    monkeypatch.setattr(functional, case.operation, lambda *args, **options: wrong(right(*args, **options)))
    ours = layers.layer_rows(case, Options("cpu", quick=True), [CEILINGS])[0]
    assert ours.status == "wrong"
    assert "x eager's" in ours.reason or "not finite" in ours.reason
    assert ours.timing is None
    assert ours.ratio is None


def test_what_plain_torch_takes_too_long_for_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "eager_seconds", lambda case, device_type: 100.0)
    rows = layers.layer_rows(replace(TINY, floor=1.0), Options("cpu"), [CEILINGS])
    assert {row.status for row in rows} == {"not run"}
    assert {row.reason for row in rows} == {"plain torch would take 100 s a call here"}
    assert not rows[0].met
    assert len(case_tables.layer_tables(rows)) == len(case_tables.floors_table(rows).rows) == 1


def test_what_is_kept_can_be_a_floor_too() -> None:
    row = LayerRow(
        "a", OURS, "fp32", TRAINING, "f", 1, 1.0, 1, "out", ratio=2.0, floor=1.0, level="avx2", kept_most=0.5
    )
    assert not row.met
    assert replace(row, kept_share=0.5).met
    assert not replace(row, kept_share=0.51).met
    assert not replace(row, kept_share=0.5, ratio=0.9).met

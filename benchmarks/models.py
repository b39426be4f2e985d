"""One whole layer or model: ours and its stock equal judged against float64, the memory each takes, then timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fusedformer.kernels.common.backend import record_decisions

from .ceilings import NATIVE, READ, Ceilings, native_level
from .gate import judge
from .memory import peak_bytes
from .model_cases import ModelCase
from .options import Options
from .peers import failures
from .rows import OURS, TransformerRow
from .timing import Subject, measure, median_of, paired_ratio, stopwatch_for, summary, threads_set_to
from .workloads import Prepared

ROUNDS = 10  # times the budget of a small case


def transformer_rows(case: ModelCase, options: Options, ceilings: Sequence[Ceilings]) -> list[TransformerRow]:
    """One row for each peer and number of threads. Ours, if it is wrong, is not timed."""
    rows = [_row(case, peer) for peer in case.workload.peers]
    chosen = ceilings if options.full or case.asks_for_something else ceilings[-1:]
    reason = case.workload.missing()
    seconds = 0.0 if reason else case.seconds(options.device_type)
    if seconds > options.patience_for_transformer:
        reason = f"{case.workload.peers[-1]} would take {seconds:.0f} s a call here"
    if reason is not None:
        return [replace(row, threads=c.threads, status="not run", reason=reason) for c in chosen for row in rows]
    judged_rows = judged(case, options)
    prepared = case.workload.prepare(case.dtype, options.device_type)
    if case.peak_most is not None:
        judged_rows = _with_memory(judged_rows, prepared, options)
    found: list[TransformerRow] = []
    for ceiling in chosen:
        try:
            with threads_set_to(ceiling.threads):
                found += _timed(judged_rows, case, prepared, options, ceiling)
        except failures() as error:
            reason = f"while timing: {error}"
            found += [replace(row, threads=ceiling.threads, status="failed", reason=reason) for row in judged_rows]
    return found


def _row(case: ModelCase, peer: str) -> TransformerRow:
    is_ours = peer == OURS
    return TransformerRow(
        case=case.name,
        peer=peer,
        dtype=case.dtype,
        direction=case.workload.direction,
        family=case.workload.name,
        length=case.workload.tokens,
        flops=case.workload.flops,
        moved_bytes=0,
        checked="",
        floor=case.floor if is_ours else None,
        read_floor=case.read_floor if is_ours else None,
        peak_most=case.peak_most if is_ours else None,
        is_default=not is_ours,
    )


def judged(case: ModelCase, options: Options) -> list[TransformerRow]:
    """The rows before any timing: how far ours and stock are from float64, and which backends ours ran on."""
    rows = [_row(case, peer) for peer in case.workload.peers]
    try:
        with record_decisions() as explanation:
            results = case.workload.ours(case.dtype, options.device_type)
    except failures() as error:
        reason = str(error).split("\n")[0]
        return [replace(row, status="failed", reason=reason) if row.is_ours else row for row in rows]
    truth, stock = case.workload.expected(case.dtype, options.device_type)
    verdict = judge(results, truth, stock)
    backends = ", ".join(dict.fromkeys(str(decision.chosen) for decision in explanation.decisions))
    found = replace(
        rows[0],
        backend=backends,
        level=native_level() if backends == NATIVE else "",
        explanation=str(explanation.decisions[0]) if explanation.decisions else "",
        status="wrong" if verdict.wrong else "ok",
        reason=verdict.wrong or "",
        checked=", ".join(truth),
        errors=verdict.errors,
        error=verdict.error,
        eager_error=verdict.eager_error,
        within_contract=verdict.wrong is None,
    )
    return [found, *rows[1:]]


def _with_memory(rows: Sequence[TransformerRow], prepared: Prepared, options: Options) -> list[TransformerRow]:
    peaks = {peer: peak_bytes(call, options.device_type) for peer, call in prepared.calls.items()}
    stock = max(peak for peer, peak in peaks.items() if peer != OURS)
    return [
        replace(row, peak_bytes=peaks[row.peer], peak_share=peaks[row.peer] / stock if row.is_ours else None)
        for row in rows
    ]


def _timed(
    rows: Sequence[TransformerRow], case: ModelCase, prepared: Prepared, options: Options, ceiling: Ceilings
) -> list[TransformerRow]:
    """The rows with their timings, torch set to the ceiling's threads; what did not run or is wrong has none."""
    ready = [row.peer for row in rows if row.status == "ok"]
    subjects = {peer: Subject(call) for peer, call in prepared.calls.items() if peer in ready}
    if case.read_floor is not None:
        subjects |= ceiling.reading(prepared.read)
    samples = measure(subjects, stopwatch_for(options.device_type), ROUNDS * options.budget)
    reads = median_of(samples.pop(READ, None))
    timings = {peer: summary(values) for peer, values in samples.items()}
    best = min((peer for peer in timings if peer != OURS), key=lambda peer: timings[peer].median, default=None)
    done = []
    for row in rows:
        row = replace(row, threads=ceiling.threads, timing=timings.get(row.peer), moved_bytes=prepared.read_bytes)
        if row.timing is not None:
            seconds, moved = row.timing.median, row.moved_bytes
            row = replace(row, shares=ceiling.shares(case.dtype, seconds, row.flops, moved, max(moved, 1), reads))
            if row.is_ours and best is not None:
                ratio = paired_ratio(samples[best], samples[OURS])
                row = replace(row, best_peer=best, speedup=timings[best].median / seconds, ratio=ratio)
        done.append(row)
    return done

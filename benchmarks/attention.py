"""One attention case: every peer judged against float64, its memory taken, then all of them timed in turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from tests.cases import Inputs

from .cases import AttentionCase, flops, moved_bytes
from .ceilings import Ceilings
from .gate import Gate
from .memory import peak_bytes
from .options import Options
from .peers import (
    OURS,
    Peer,
    PeerFailed,
    default_sdpa,
    explanation,
    failures,
    ours,
    peers,
    results,
    subject,
    too_large,
    without,
)
from .rows import AttentionRow
from .timing import GRAPH_BELOW_SECONDS, Timing, graph_seconds, measure, stopwatch_for, threads_set_to


def attention_rows(case: AttentionCase, options: Options, ceilings: Sequence[Ceilings]) -> list[AttentionRow]:
    """One row for each peer and number of threads. Ours, if it is wrong, is not timed."""
    given = case.inputs(options.device_type)
    timed = without(given, "seed")  # a user gives none
    contenders = {peer.name: peer for peer in peers(options.device_type, compiled=options.full)}
    judged = _judged(case, given, timed, contenders)
    rows: list[AttentionRow] = []
    for ceiling in ceilings:
        ready = [contenders[row.peer] for row in judged if row.status == "ok"]
        try:
            with threads_set_to(ceiling.threads):
                timings = _timings(ready, timed, options, case.direction)
        except failures() as error:
            failure = {"status": "failed", "reason": f"while timing: {error}"}
            rows += [replace(row, threads=ceiling.threads, **failure) for row in judged]
            continue
        rows += [_timed(row, timings, ceiling) for row in judged]
    return rows


def _judged(case: AttentionCase, given: Inputs, timed: Inputs, contenders: Mapping[str, Peer]) -> list[AttentionRow]:
    """The rows before any timing: whether each peer runs, how far it is from float64, and the memory it takes."""
    explained = explanation(timed, case.direction)
    default = default_sdpa(timed)
    reason = ""
    if case.dropout_p and explained.backend == "torch":
        given, reason = without(given, "seed", "dropout_p"), "judged without dropout: torch draws its own mask"
    gate = Gate(given, case.direction)
    blank = AttentionRow(
        case=case.name,
        peer="",
        dtype=case.dtype,
        direction=case.direction,
        family=case.family,
        length=case.len_k or case.len_q,
        threads=0,
        status="ok",
        reason=reason,
        timing=None,
        flops=flops(given, case.direction),
        moved_bytes=moved_bytes(given, case.direction),
        peak_bytes=None,
        ceiling_share=None,
        error=None,
        eager_error=None,
        within_contract=None,
        checked=gate.checked,
        best_peer="",
        speedup=None,
        backend="",
        is_default=False,
        explanation="",
    )
    rows = []
    for name, peer in contenders.items():
        row = replace(blank, peer=name, is_default=name == default)
        if name == OURS:
            # By name, since a seed can change auto's choice, and what is judged shall be what is timed.
            peer = ours(str(explained.backend))
            row = replace(row, backend=str(explained.backend), explanation=str(explained))
        rows.append(_tried(row, peer, given, gate))
    return rows


def _tried(row: AttentionRow, peer: Peer, given: Inputs, gate: Gate) -> AttentionRow:
    refusal = too_large(peer, given)
    if refusal is not None:
        return replace(row, status="not run", reason=refusal)
    try:
        found = results(peer, given, row.direction)
        peak = peak_bytes(lambda: results(peer, given, row.direction), given.query.device.type)
    except PeerFailed as failure:
        return replace(row, status="failed", reason=str(failure))
    if "seed" in given.options and peer.name != OURS:
        return replace(row, peak_bytes=peak, reason="not judged: it draws its own dropout mask")
    verdict = gate.judge(found)
    is_wrong = verdict.wrong is not None
    return replace(
        row,
        status="wrong" if is_wrong and peer.name == OURS else "ok",
        reason=verdict.wrong or row.reason,
        peak_bytes=peak,
        error=verdict.error,
        eager_error=verdict.eager_error,
        within_contract=not is_wrong,
    )


def _timings(contenders: Sequence[Peer], timed: Inputs, options: Options, direction: str) -> dict[str, Timing]:
    subjects = {peer.name: subject(peer, timed, direction) for peer in contenders}
    timings = measure(subjects, stopwatch_for(options.device_type), options.budget)
    if options.device_type == "cuda":
        for name, timing in timings.items():
            if timing.median < GRAPH_BELOW_SECONDS:
                with subjects[name].scope():
                    timings[name] = replace(timing, graph=graph_seconds(subjects[name].call))
    return timings


def _timed(row: AttentionRow, timings: Mapping[str, Timing], ceiling: Ceilings) -> AttentionRow:
    timing = timings.get(row.peer)
    row = replace(row, threads=ceiling.threads, timing=timing)
    if timing is None:
        return row
    row = replace(row, ceiling_share=ceiling.seconds(row.dtype, row.flops, row.moved_bytes) / timing.median)
    others = [name for name in timings if name != OURS]
    if row.peer != OURS or not others:
        return row
    best = min(others, key=lambda name: timings[name].median)
    return replace(row, best_peer=best, speedup=timings[best].median / timing.median)

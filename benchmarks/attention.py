"""One attention case: every peer judged against float64, its memory taken, then all of them timed in turn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import fusedformer
from fusedformer import functional as F
from tests.cases import Inputs

from .cases import AttentionCase, flops, moved_bytes
from .ceilings import Ceilings
from .gate import Gate
from .memory import peak_bytes
from .options import Options
from .peers import (
    PLAIN,
    Peer,
    PeerFailed,
    default_sdpa,
    failures,
    ours,
    peers,
    results,
    subject,
    too_large,
    without,
)
from .rows import OURS, AttentionRow
from .timing import GRAPH_BELOW_SECONDS, Timing, graph_seconds, measure, stopwatch_for, threads_set_to


def attention_rows(case: AttentionCase, options: Options, ceilings: Sequence[Ceilings]) -> list[AttentionRow]:
    """One row for each peer and number of threads. Ours, if it is wrong, is not timed."""
    given = case.inputs(options.device_type)
    timed = without(given, "seed")  # a user gives none
    contenders = peers(options.device_type, compiled=options.full)
    seconds = flops(given, case.direction) / ceilings[-1].matmul[case.dtype]
    too_slow = f"a call takes {seconds:.1f} s at the rate this machine multiplies {case.dtype} matrices"
    untimed = judged(case, given, timed, contenders, too_slow if seconds > options.patience else "")
    ready = [peer for peer, row in zip(contenders, untimed, strict=True) if row.status == "ok"]
    rows: list[AttentionRow] = []
    for ceiling in ceilings:
        try:
            with threads_set_to(ceiling.threads):
                timings = _timings(ready, timed, options, case.direction)
        except failures() as error:
            reason = f"while timing: {error}"
            rows += [replace(row, threads=ceiling.threads, status="failed", reason=reason) for row in untimed]
            continue
        rows += [_timed(row, timings, ceiling) for row in untimed]
    return rows


def judged(
    case: AttentionCase, given: Inputs, timed: Inputs, contenders: Iterable[Peer], too_slow: str = ""
) -> list[AttentionRow]:
    """The rows before any timing: whether each peer runs, how far it is from float64, and the memory it takes.

    Args:
        given: the case's inputs.
        timed: the same as a user would give them, without a seed.
        contenders: the peers.
        too_slow: why the equation in plain torch operations is not waited for; "" where it is.
    """
    asked = timed if case.direction == "forward" else timed.leaves()[0]
    explained = fusedformer.explain(F.attention, asked.query, asked.key, asked.value, **asked.options)
    default = default_sdpa(asked)
    backend, reason = str(explained.backend), ""
    if case.dropout_p and backend == "torch":
        given, reason = without(given, "seed", "dropout_p"), "judged without dropout: torch draws its own mask"
    gate = Gate(given, case.direction, backend)
    rows = []
    for peer in contenders:
        row = AttentionRow(
            case=case.name,
            peer=peer.name,
            dtype=case.dtype,
            direction=case.direction,
            family=case.family,
            length=case.len_k or case.len_q,
            flops=flops(given, case.direction),
            moved_bytes=moved_bytes(given, case.direction),
            checked=gate.checked,
            reason=reason,
            is_default=peer.name == default,
        )
        if row.is_ours:
            row = replace(row, backend=backend, explanation=str(explained))
        refusal = too_slow if too_slow and peer.name in PLAIN else too_large(peer, given)
        if refusal is None:
            rows.append(_tried(row, peer, given, timed, gate))
        else:
            rows.append(replace(row, status="not run", reason=refusal))
    return rows


def _tried(row: AttentionRow, peer: Peer, given: Inputs, timed: Inputs, gate: Gate) -> AttentionRow:
    # Ours by name, since a seed can change auto's choice, and what is judged shall be what is timed.
    judged_peer = ours(row.backend) if row.is_ours else peer
    try:
        found = results(judged_peer, given, row.direction)
        peak = peak_bytes(lambda: results(peer, timed, row.direction), timed.query.device.type)
    except PeerFailed as failure:
        return replace(row, status="failed", reason=str(failure))
    if "seed" in given.options and not row.is_ours:
        return replace(row, peak_bytes=peak, reason="not judged: it draws its own dropout mask")
    verdict = gate.judge(found)
    is_wrong = verdict.wrong is not None
    return replace(
        row,
        status="wrong" if is_wrong and row.is_ours else "ok",
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

"""One attention case: every peer judged against float64, its memory taken, then all of them timed in turn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

import fusedformer
from tests.cases import Inputs

from .cases import AttentionCase, flops, moved_bytes, operand_bytes
from .ceilings import NATIVE, READ, Ceilings, native_level
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
from .timing import (
    GRAPH_BELOW_SECONDS,
    graph_seconds,
    measure,
    median_of,
    paired_ratio,
    stopwatch_for,
    summary,
    threads_set_to,
)


def attention_rows(case: AttentionCase, options: Options, ceilings: Sequence[Ceilings]) -> list[AttentionRow]:
    """One row for each peer and number of threads. Ours, if it is wrong, is not timed."""
    given = case.inputs(options.device_type)
    timed = without(given, "seed")  # a user gives none
    contenders = peers(options.device_type, options.full, case.is_decode)
    if not options.every_peer:
        default = default_sdpa(_asked(timed, case))
        contenders = [peer for peer in contenders if peer.name in (OURS, default)]
    seconds = flops(given, case.direction) / max(ceiling.matmul[case.dtype] for ceiling in ceilings)
    too_slow = f"a call takes {seconds:.1f} s at the rate this machine multiplies {case.dtype} matrices"
    untimed = judged(case, given, timed, contenders, too_slow if seconds > options.patience else "")
    ready = [peer for peer, row in zip(contenders, untimed, strict=True) if row.status == "ok"]
    rows: list[AttentionRow] = []
    for ceiling in ceilings:
        try:
            with threads_set_to(ceiling.threads):
                rows += _timed(untimed, ready, timed, options, ceiling)
        except failures() as error:
            reason = f"while timing: {error}"
            rows += [replace(row, threads=ceiling.threads, status="failed", reason=reason) for row in untimed]
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
    asked = _asked(timed, case)
    call = ours(is_decode=case.is_decode).prepare(asked)
    assert isinstance(call, partial)
    explained = fusedformer.explain(call.func, *call.args, **call.keywords)
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
            floor=case.floor,
            read_floor=case.read_floor,
            is_default=peer.name == default,
        )
        judged_peer = peer
        if row.is_ours:
            level = native_level() if backend == NATIVE else ""
            row = replace(row, backend=backend, level=level, explanation=str(explained))
            # By name, since a seed can change auto's choice, and what is judged shall be what is timed.
            judged_peer = ours(backend, case.is_decode)
        refusal = too_slow if too_slow and peer.name in PLAIN else too_large(peer, given)
        if refusal is None:
            rows.append(_tried(row, judged_peer, given, timed, gate))
        else:
            rows.append(replace(row, status="not run", reason=refusal))
    return rows


def _tried(row: AttentionRow, peer: Peer, given: Inputs, timed: Inputs, gate: Gate) -> AttentionRow:
    try:
        found = results(peer, given, row.direction)
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
        errors=verdict.errors,
        error=verdict.error,
        eager_error=verdict.eager_error,
        within_contract=not is_wrong,
    )


def _timed(
    rows: Sequence[AttentionRow], contenders: Sequence[Peer], inputs: Inputs, options: Options, ceiling: Ceilings
) -> list[AttentionRow]:
    """The rows with their timings, torch set to the ceiling's threads; what did not run or is wrong has none."""
    direction = rows[0].direction
    subjects = {peer.name: subject(peer, inputs, direction) for peer in contenders}
    if rows[0].read_floor is not None:
        subjects |= ceiling.reading((inputs.query, inputs.key, inputs.value))
    samples = measure(subjects, stopwatch_for(options.device_type), options.budget)
    reads = median_of(samples.pop(READ, None))
    timings = {name: summary(values) for name, values in samples.items()}
    if options.device_type == "cuda":
        for name, timing in timings.items():
            if timing.median < GRAPH_BELOW_SECONDS:
                with subjects[name].scope():
                    timings[name] = replace(timing, graph=graph_seconds(subjects[name].call))
    default = next((row.peer for row in rows if row.is_default and row.peer in timings), None)
    best = min((name for name in timings if name != OURS), key=lambda name: timings[name].median, default=None)
    done = []
    for row in rows:
        row = replace(row, threads=ceiling.threads, timing=timings.get(row.peer))
        if row.timing is not None:
            seconds, working_set = row.timing.median, operand_bytes(inputs)
            shares = ceiling.shares(row.dtype, seconds, row.flops, row.moved_bytes, working_set, reads)
            row = replace(row, shares=shares)
            if row.is_ours and best is not None:
                row = replace(row, best_peer=best, speedup=timings[best].median / seconds)
            if row.is_ours and default is not None:
                row = replace(row, ratio=paired_ratio(samples[default], samples[OURS]))
        done.append(row)
    return done


def _asked(inputs: Inputs, case: AttentionCase) -> Inputs:
    """As they are when the case is timed: with gradients or without."""
    return inputs if case.direction == "forward" else inputs.leaves()[0]

"""One feed-forward or norm case: ours and plain torch judged against float64, what each keeps and takes, then timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

import fusedformer

from .ceilings import NATIVE, READ, Ceilings, native_level
from .gate import judge
from .layer_cases import Function, LayerCase, LayerInputs
from .memory import kept_bytes, peak_bytes
from .options import Options
from .peers import Results, failures
from .rows import OURS, LayerRow
from .timing import Subject, measure, median_of, paired_ratio, stopwatch_for, summary, threads_set_to

EAGER, COMPILED = "eager", "compiled"
ATTEMPTS = 2  # at eager's error, which of so many numbers varies little


@dataclass(frozen=True)
class LayerPeer:
    """One way to compute a case: a function of its tensors and options by name."""

    name: str
    function: Function


def layer_rows(case: LayerCase, options: Options, ceilings: Sequence[Ceilings]) -> list[LayerRow]:
    """One row for each peer and number of threads. Ours, if it is wrong, is not timed."""
    peers = peers_of(case)
    seconds = eager_seconds(case, options.device_type)
    if seconds > options.patience_for_layer:
        reason = f"plain torch would take {seconds:.0f} s a call here"
        return [
            replace(_row(case, peer), threads=c.threads, status="not run", reason=reason)
            for c in ceilings
            for peer in peers
        ]
    inputs = case.inputs(options.device_type)
    untimed = judged(case, inputs, peers, options)
    ready = [peer for peer, row in zip(peers, untimed, strict=True) if row.status == "ok"]
    rows: list[LayerRow] = []
    for ceiling in ceilings:
        try:
            with threads_set_to(ceiling.threads):
                rows += _timed(untimed, ready, case, inputs, options, ceiling)
        except failures() as error:
            reason = f"while timing: {error}"
            rows += [replace(row, threads=ceiling.threads, status="failed", reason=reason) for row in untimed]
    return rows


def peers_of(case: LayerCase) -> list[LayerPeer]:
    """Ours first, then plain torch operations, and those compiled."""
    torch._dynamo.reset()  # each case compiles for its own shapes
    compiled = torch.compile(case.plain, dynamic=False)
    return [LayerPeer(OURS, case.ours), LayerPeer(EAGER, case.plain), LayerPeer(COMPILED, compiled)]


def eager_seconds(case: LayerCase, device_type: str) -> float:
    """How long plain torch takes, about: by a few of the tokens. A CPU may lack the instructions of a half type."""
    few = replace(case, tokens=max(1, case.tokens // 16))
    call = subject(few.plain, few.inputs(device_type).without_seed(), case.direction)
    return stopwatch_for(device_type)(call, 1) * case.tokens / few.tokens


def _row(case: LayerCase, peer: LayerPeer) -> LayerRow:
    return LayerRow(
        case=case.name,
        peer=peer.name,
        dtype=case.dtype,
        direction=case.direction,
        family=case.family,
        length=case.tokens,
        flops=case.flops,
        moved_bytes=0,
        checked="",
        floor=case.floor,
        read_floor=case.read_floor,
        kept_most=case.kept_most,
        is_default=peer.name == EAGER,
    )


def judged(case: LayerCase, inputs: LayerInputs, peers: Sequence[LayerPeer], options: Options) -> list[LayerRow]:
    """The rows before any timing: whether each peer runs, how far it is from float64, and the memory it takes."""
    asked = inputs.without_seed()  # a user gives none
    leaves = asked if case.direction == "forward" else asked.leaves()
    explained = fusedformer.explain(case.ours, **leaves.tensors, **leaves.options)
    backend, draws_its_own = str(explained.backend), ""
    given = inputs
    if case.dropout_p and backend == "torch":
        given = replace(asked, options={**asked.options, "dropout_p": 0.0})
        draws_its_own = "judged without dropout: torch draws its own mask"
    truth = _results(case.eager(), given.to(torch.float64), case.direction)
    eager = [_results(case.eager(attempt), given, case.direction) for attempt in range(ATTEMPTS)]
    rows: list[LayerRow] = []
    for peer in peers:
        row = replace(_row(case, peer), moved_bytes=case.moved_bytes(inputs), checked=", ".join(truth))
        if row.is_ours:
            level = native_level() if backend == NATIVE else ""
            row = replace(row, backend=backend, level=level, explanation=str(explained), reason=draws_its_own)
        try:
            row = _tried(row, peer, case, given, asked, truth, eager, options)
        except failures() as error:
            row = replace(row, status="failed", reason=str(error).split("\n")[0])
        rows.append(row)
    theirs = next(row.kept_bytes for row in rows if row.peer == EAGER)
    return [replace(row, kept_share=_share(row.kept_bytes, theirs)) if row.is_ours else row for row in rows]


def _tried(
    row: LayerRow,
    peer: LayerPeer,
    case: LayerCase,
    given: LayerInputs,
    asked: LayerInputs,
    truth: Results,
    eager: Sequence[Results],
    options: Options,
) -> LayerRow:
    peak = peak_bytes(lambda: _results(peer.function, asked, case.direction), options.device_type)
    leaves = asked.leaves()
    call = partial(_call, peer.function, leaves)
    kept = None if case.direction == "forward" else kept_bytes(call, leaves.tensors.values())
    row = replace(row, peak_bytes=peak, kept_bytes=kept)
    if not row.is_ours:
        if case.dropout_p:
            return replace(row, reason="not judged: it draws its own dropout mask")
        verdict = judge(_results(peer.function, asked, case.direction), truth, eager)
    else:  # by name, since a seed can change auto's choice, and what is judged shall be what is timed
        verdict = judge(_results(partial(case.ours, backend=row.backend), given, case.direction), truth, eager)
    is_wrong = verdict.wrong is not None
    return replace(
        row,
        status="wrong" if is_wrong and row.is_ours else "ok",
        reason=verdict.wrong or row.reason,
        errors=verdict.errors,
        error=verdict.error,
        eager_error=verdict.eager_error,
        within_contract=not is_wrong,
    )


def _timed(
    rows: Sequence[LayerRow],
    ready: Sequence[LayerPeer],
    case: LayerCase,
    inputs: LayerInputs,
    options: Options,
    ceiling: Ceilings,
) -> list[LayerRow]:
    """The rows with their timings, torch set to the ceiling's threads; what did not run or is wrong has none."""
    inputs = inputs.without_seed()
    subjects = {peer.name: Subject(subject(peer.function, inputs, case.direction)) for peer in ready}
    if case.read_floor is not None:
        subjects |= ceiling.reading(inputs.tensors.values())
    samples = measure(subjects, stopwatch_for(options.device_type), options.budget)
    reads = median_of(samples.pop(READ, None))
    timings = {name: summary(values) for name, values in samples.items()}
    best = min((name for name in timings if name != OURS), key=lambda name: timings[name].median, default=None)
    working_set = sum(x.numel() * x.element_size() for x in inputs.tensors.values())
    done = []
    for row in rows:
        row = replace(row, threads=ceiling.threads, timing=timings.get(row.peer))
        if row.timing is not None:
            seconds = row.timing.median
            shares = ceiling.shares(row.dtype, seconds, row.flops, row.moved_bytes, working_set, reads)
            row = replace(row, shares=shares)
            if row.is_ours and best is not None:
                ratio = paired_ratio(samples[best], samples[OURS])
                row = replace(row, best_peer=best, speedup=timings[best].median / seconds, ratio=ratio)
        done.append(row)
    return done


def _call(function: Function, inputs: LayerInputs) -> Tensor:
    return function(**inputs.tensors, **inputs.options)


def subject(function: Function, inputs: LayerInputs, direction: str) -> Callable[[], object]:
    """What to time of a function."""
    if direction == "forward":
        return partial(_call, function, inputs)
    leaves = inputs.leaves()
    tensors = list(leaves.tensors.values())
    return lambda: torch.autograd.grad(_call(function, leaves), tensors, inputs.grad_out)


def _results(function: Function, inputs: LayerInputs, direction: str) -> Results:
    """The output and, unless only the forward is asked for, the gradient of every tensor."""
    if direction == "forward":
        return {"out": _call(function, inputs)}
    leaves = inputs.leaves()
    out = _call(function, leaves)
    grads = torch.autograd.grad(out, list(leaves.tensors.values()), inputs.grad_out)
    return {"out": out.detach()} | {f"grad {name}": grad for name, grad in zip(leaves.tensors, grads, strict=True)}


def _share(kept: int | None, eager: int | None) -> float | None:
    return None if kept is None or not eager else kept / eager

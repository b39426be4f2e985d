"""``pytest benchmarks``: the attention cases under pytest-benchmark, each peer by itself. ``FULL=1`` for every case.

For numbers to compare over time (``--benchmark-autosave``); ``python -m benchmarks`` interleaves the peers.
"""

from __future__ import annotations

import os

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from .attention import judged
from .cases import AttentionCase, selected
from .options import Options
from .peers import peers, subject, without
from .timing import Call, CpuStopwatch, repeats_for

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FULL = os.environ.get("FULL") == "1"
ROUNDS = 7


@pytest.mark.parametrize("name", [peer.name for peer in peers(DEVICE, compiled=FULL)])
@pytest.mark.parametrize("case", selected(Options(DEVICE, FULL)), ids=lambda case: case.name)
def test_attention(benchmark: BenchmarkFixture, case: AttentionCase, name: str) -> None:
    peer = next(peer for peer in peers(DEVICE, FULL, case.is_decode) if peer.name == name)
    benchmark.group = case.name
    given = case.inputs(DEVICE)
    timed = without(given, "seed")
    (row,) = judged(case, given, timed, [peer])
    if row.is_ours:
        assert row.status == "ok", row.reason
    elif row.status != "ok":
        pytest.skip(f"{peer.name} does not run it: {row.reason}")
    benchmark.extra_info.update(backend=row.backend, error=row.error, eager_error=row.eager_error)
    contender = subject(peer, timed, case.direction)
    with contender.scope():
        timed_by(benchmark, contender.call)


def timed_by(benchmark: BenchmarkFixture, call: Call) -> None:
    """Times a call, repeated until the clock can tell."""
    call, stopwatch = _synchronised(call), CpuStopwatch()
    call()
    benchmark.pedantic(call, rounds=ROUNDS, iterations=repeats_for(stopwatch(call, 1), stopwatch))


def _synchronised(call: Call) -> Call:
    if DEVICE == "cpu":
        return call

    def call_and_wait() -> None:
        call()
        torch.cuda.synchronize()

    return call_and_wait

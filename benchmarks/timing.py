"""How long calls take: interleaved in one process, so that what else the machine does meets them all alike."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Protocol

import torch

Call = Callable[[], object]

MAX_SAMPLES = 400
MAX_REPEATS = 10_000
ENOUGH_SAMPLES = 5
FLUSHED_BYTES = 256 << 20  # beyond any GPU's L2
GRAPH_BELOW_SECONDS = 100e-6  # under this, launching outweighs the kernel, and a captured graph tells them apart


@dataclass(frozen=True)
class Subject:
    """What is timed, and what is in force meanwhile, entered and left outside of the timing."""

    call: Call
    scope: Callable[[], AbstractContextManager[object]] = nullcontext


class Stopwatch(Protocol):
    """Seconds that one of ``repeats`` calls in a row took. ``shortest`` is the least time it can tell apart."""

    shortest: float

    def __call__(self, call: Call, repeats: int) -> float: ...


class CpuStopwatch:
    """The wall clock; short calls are repeated until its resolution does not matter."""

    shortest = 200e-6

    def __call__(self, call: Call, repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats


class CudaStopwatch:
    """Device events around each call, after a write that leaves none of its operands in the L2 cache."""

    shortest = 0.0

    def __init__(self) -> None:
        self._flushed = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device="cuda")
        self._start = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)

    def __call__(self, call: Call, repeats: int) -> float:
        total = 0.0
        for _ in range(repeats):
            self._flushed.zero_()
            self._start.record()
            call()
            self._end.record()
            self._end.synchronize()
            total += self._start.elapsed_time(self._end)
        return total / repeats / 1e3


@dataclass(frozen=True)
class Timing:
    """Seconds of a call. ``graph``: of one replayed from a CUDA graph, where it was asked for and could be captured."""

    median: float
    p20: float
    p80: float
    samples: int
    graph: float | None = None


def stopwatch_for(device_type: str) -> Stopwatch:
    return CudaStopwatch() if device_type == "cuda" else CpuStopwatch()


def measure(subjects: Mapping[str, Subject], stopwatch: Stopwatch, budget: float) -> dict[str, list[float]]:
    """The seconds of every subject, timed in turn, round after round, the other way around in every second one.

    Each gets ``budget`` seconds, at most four times that until it has enough samples, and at least one sample: one far
    slower than the others leaves early. One call of each goes before, to warm up and to tell how often to repeat it.
    """

    def timed(name: str, repeats: int) -> float:
        with subjects[name].scope():
            return stopwatch(subjects[name].call, repeats)

    def goes_on(name: str) -> bool:
        enough = len(samples[name]) >= ENOUGH_SAMPLES
        return len(samples[name]) < MAX_SAMPLES and spent[name] < (budget if enough else 4 * budget)

    repeats = {name: repeats_for(timed(name, 1), stopwatch) for name in subjects}
    samples: dict[str, list[float]] = {name: [] for name in subjects}
    spent = dict.fromkeys(subjects, 0.0)
    active = list(subjects)
    while active:
        for name in active:
            seconds = timed(name, repeats[name])
            samples[name].append(seconds)
            spent[name] += seconds * repeats[name]
        active = [name for name in reversed(active) if goes_on(name)]
    return samples


def repeats_for(once: float, stopwatch: Stopwatch) -> int:
    """How often to repeat a call of ``once`` seconds for the stopwatch to tell its time."""
    return min(MAX_REPEATS, max(1, math.ceil(stopwatch.shortest / max(once, 1e-9))))


@contextmanager
def threads_set_to(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def summary(samples: Sequence[float]) -> Timing:
    if len(samples) == 1:
        return Timing(samples[0], samples[0], samples[0], 1)
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return Timing(statistics.median(samples), fifths[0], fifths[3], len(samples))


def median_of(samples: Sequence[float] | None) -> float | None:
    """Nothing where nothing was timed."""
    return statistics.median(samples) if samples else None


def paired_ratio(samples: Sequence[float], ours: Sequence[float]) -> float:
    """The median over the rounds of what was sampled over ours of the same round, so that no drift enters."""
    return statistics.median(other / own for other, own in zip(samples, ours, strict=False))


def graph_seconds(call: Call, calls: int = 20, replays: int = 20) -> float | None:
    """Seconds of a call replayed from a CUDA graph, caches warm; None where it cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with suppress(RuntimeError):
        with torch.cuda.graph(graph):
            for _ in range(calls):
                call()
        stopwatch = CudaStopwatch()
        return statistics.median(stopwatch(graph.replay, 1) for _ in range(replays)) / calls
    return None

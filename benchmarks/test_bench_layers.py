"""``pytest benchmarks``: feed-forward, norm and whole layers under pytest-benchmark. ``FULL=1`` for every case."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from .layer_cases import LayerCase
from .layer_cases import selected as layer_cases
from .layers import COMPILED, EAGER, judged, peers_of, subject
from .model_cases import ModelCase
from .model_cases import selected as model_cases
from .models import judged as judged_model
from .options import Options
from .rows import OURS
from .test_bench_attention import DEVICE, FULL, timed_by

OPTIONS = Options(DEVICE, FULL)


@pytest.mark.parametrize("name", [OURS, EAGER, COMPILED])
@pytest.mark.parametrize("case", layer_cases(OPTIONS), ids=lambda case: case.name)
def test_layer(benchmark: BenchmarkFixture, case: LayerCase, name: str) -> None:
    peer = next(peer for peer in peers_of(case) if peer.name == name)
    inputs = case.inputs(DEVICE)
    row = next(row for row in judged(case, inputs, peers_of(case), OPTIONS) if row.peer == name)
    if row.is_ours:
        assert row.status == "ok", row.reason
    benchmark.group = case.name
    benchmark.extra_info.update(backend=row.backend, error=row.error, eager_error=row.eager_error)
    timed_by(benchmark, subject(peer.function, inputs.without_seed(), case.direction))


@pytest.mark.parametrize("case", model_cases(OPTIONS), ids=lambda case: case.name)
def test_model(benchmark: BenchmarkFixture, case: ModelCase) -> None:
    missing = case.workload.missing()
    if missing is not None:
        pytest.skip(missing)
    row = next(row for row in judged_model(case, OPTIONS) if row.is_ours)
    assert row.status == "ok", row.reason
    benchmark.extra_info.update(backend=row.backend, error=row.error, eager_error=row.eager_error)
    timed_by(benchmark, case.workload.prepare(case.dtype, DEVICE).calls[OURS])

"""Weights that are packed once and kept: the same bits as without, wherever they are read and wherever they are not."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from fusedformer import explain
from fusedformer.functional import feed_forward, linear
from fusedformer.kernels.common import native
from fusedformer.kernels.common.packed import packed, release
from tests.lanes import RUNNABLE, built, every_level
from tests.tolerances import assert_equal_bits

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KEEPING = [name for name in RUNNABLE if name in ("amx", "emulated")]  # the others read weights as they lie
keeping = pytest.mark.skipif(not KEEPING, reason="no level that keeps packed weights runs here")


def make(*shapes: tuple[int, ...], dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@every_level
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(33, 70), (1060, 40), (40, 600)], ids=str)
def test_a_kept_weight_changes_no_bits(level: str, sizes: tuple[int, int], dtype: torch.dtype, seed: int) -> None:
    in_features, out_features = sizes
    weight, bias, x = make((out_features, in_features), (out_features,), (70, in_features), dtype=dtype, seed=seed)
    plain = {rows: linear(x[:rows], weight, bias) for rows in (1, 9, 70)}
    kept = native.keep_packed(weight)
    assert (kept > 0) is (level in KEEPING)
    for rows, out in plain.items():
        assert_equal_bits(linear(x[:rows], weight, bias), out, f"{rows} rows")
    release(weight)
    assert packed(weight) is None


@every_level
@pytest.mark.parametrize("gated", [False, True])
def test_kept_weights_of_feed_forward_change_no_bits(level: str, gated: bool, seed: int) -> None:
    x, weight1, weight2, gate = make((20, 33), (70, 33), (40, 70), (70, 33), dtype=torch.bfloat16, seed=seed)
    network = partial(feed_forward, gate_weight=gate if gated else None)
    plain = network(x, weight1, weight2)
    for weight in (weight1, weight2, gate):
        native.keep_packed(weight)
    assert_equal_bits(network(x, weight1, weight2), plain)
    if level in KEEPING:  # and they are what is read
        for weight in (weight1, weight2, gate):
            weight.zero_()
        assert_equal_bits(network(x, weight1, weight2), plain)


@built
@keeping
def test_a_kept_weight_is_read_only_where_it_fits(seed: int) -> None:
    x, weight = make((20, 64), (64, 64), dtype=torch.float32, seed=seed)
    level = KEEPING[0]
    with native.use_level(level):
        kept = native.keep_packed(weight)
        old = linear(x, weight)
        (decision,) = explain(lambda x: linear(x, weight), x).decisions
        note = f"keeps {kept:,} bytes, the weight float32 (64, 64) packed for level {level}"
        assert kept > 3 * 2 * 64 * 64
        assert decision.chosen == "cpu"
        assert note in decision.notes
        weight.zero_()
        assert_equal_bits(linear(x, weight), old)  # as was promised
        grad = torch.ones((), requires_grad=True)
        assert linear(x * grad, weight).count_nonzero() == 0, "a call with gradients"
        weight.data = weight.bfloat16()
        assert linear(x.bfloat16(), weight).count_nonzero() == 0, "another dtype"
        weight.data = weight.float().new_zeros(32, 64)
        assert linear(x, weight).count_nonzero() == 0, "another shape"
        weight.data = weight.new_zeros(64, 64)
    for name in RUNNABLE:
        if name != level:
            with native.use_level(name):
                assert linear(x, weight).count_nonzero() == 0, "another level"


@built
@keeping
def test_a_weight_that_packing_would_change_is_not_kept(seed: int) -> None:
    x, weight = make((20, 64), (64, 64), dtype=torch.float32, seed=seed)
    weight[3, 5] = 1e-38
    with native.use_level(KEEPING[0]):
        plain = linear(x, weight)
        assert native.keep_packed(weight) == 0
        assert_equal_bits(linear(x, weight), plain)

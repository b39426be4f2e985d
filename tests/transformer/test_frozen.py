"""Freezing, and not freezing: a change of a weight is never missed unless someone promised that there is none."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch

import fusedformer
from fusedformer import nn
from fusedformer.kernels.common import native
from fusedformer.kernels.common.packed import packed
from fusedformer.transformer.frozen import freeze, unfreeze
from tests.lanes import RUNNABLE, built
from tests.tolerances import assert_equal_bits

D, FF, ROWS = 32, 48, 20
KEEPING = [name for name in RUNNABLE if name in ("amx", "emulated")]


def network(gated: bool = False) -> nn.FeedForward:
    return (nn.GatedFeedForward if gated else nn.FeedForward)(D, FF).eval()


def double_in_place(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2.0)


def double_data(module: torch.nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data *= 2.0


def replace_data(module: torch.nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data = parameter.data * 2.0


def load(module: torch.nn.Module) -> None:
    module.load_state_dict({name: 2.0 * x for name, x in module.state_dict().items()})


def optimize(module: torch.nn.Module) -> None:
    for parameter in module.parameters():
        parameter.grad = -parameter.detach()
    torch.optim.SGD(module.parameters(), lr=1.0).step()


CHANGES = [double_in_place, double_data, replace_data, load, optimize]


@pytest.mark.parametrize("level", RUNNABLE)
@pytest.mark.parametrize("change", CHANGES)
def test_no_change_is_missed(level: str, change: Callable[[torch.nn.Module], None], seed: int) -> None:
    module, x = network(), torch.randn(ROWS, D)
    expected = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter.mul_(2.0)
        with native.use_level(level):
            before = module(x)
            change(module)
            assert_equal_bits(module(x), expected(x))
            assert not torch.equal(before, expected(x))


@pytest.mark.parametrize("level", RUNNABLE)
@pytest.mark.parametrize("gated", [False, True])
def test_frozen_until_unfrozen(level: str, gated: bool, seed: int) -> None:
    module, x = network(gated), torch.randn(ROWS, D)
    names = set(module.state_dict())
    with torch.no_grad(), native.use_level(level):
        before = module(x)
        kept = module.freeze()
        assert (kept > 0) is (level in KEEPING)
        assert_equal_bits(module(x), before)
        assert set(module.state_dict()) == names
        changed = copy.deepcopy(module)
        double_data(module)
        double_data(changed)
        if kept > 0:
            assert not torch.equal(module(x), changed(x))
        module.unfreeze()
        assert_equal_bits(module(x), changed(x))


@built
@pytest.mark.skipif(not KEEPING, reason="no level that keeps packed weights runs here")
def test_neither_copies_nor_files_are_frozen(seed: int) -> None:
    module = network()
    with native.use_level(KEEPING[0]):
        assert freeze(module) > 0
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        for other in (copy.deepcopy(module), torch.load(file, weights_only=False)):
            assert packed(other.linear1.weight) is None
        assert packed(module.linear1.weight) is not None
        unfreeze(module)
        assert packed(module.linear1.weight) is None


@built
@pytest.mark.skipif(not KEEPING, reason="no level that keeps packed weights runs here")
def test_attention_is_frozen_too(seed: int) -> None:
    x = torch.randn(2, ROWS, D)
    with native.use_level(KEEPING[0]), torch.no_grad():
        for sizes in ({}, {"kdim": D, "vdim": D // 2}):
            module = nn.MultiheadAttention(D, 4, batch_first=True, **sizes).eval()
            value = x[..., : sizes.get("vdim", D)]
            before = module(x, x, value, need_weights=False)[0]
            assert freeze(module) > 0
            weights = [x for name, x in module.named_parameters() if x.dim() == 2]
            assert all(packed(weight) is not None for weight in weights)
            assert_equal_bits(module(x, x, value, need_weights=False)[0], before)
            unfreeze(module)
            assert all(packed(weight) is None for weight in weights)


@pytest.mark.parametrize("level", RUNNABLE)
def test_a_fused_model_is_frozen_until_it_is_unfused(level: str, seed: int) -> None:
    model = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(D, 4, FF, batch_first=True), 2).eval()
    head = torch.nn.Sequential(model, torch.nn.Linear(D, 3))
    x = torch.randn(1, ROWS, D)
    with torch.no_grad(), native.use_level(level):
        plain = fusedformer.fuse(head)
        assert plain.frozen_bytes is None
        before = head(x)
        report = fusedformer.fuse(head, frozen=True)
        weights = [parameter for parameter in model.parameters() if parameter.dim() == 2]
        kept = [packed(weight) for weight in weights]
        assert report.frozen_bytes == sum(0 if data is None else data.numel() for data in kept)
        assert (report.frozen_bytes > 0) is (level in KEEPING)
        assert f"packed copies of frozen weights: {report.frozen_bytes:,} bytes" in str(report)
        assert all((data is not None) is (level in KEEPING) for data in kept)
        assert packed(head[1].weight) is None, "torch multiplies it"
        assert_equal_bits(head(x), before)
        explained = str(fusedformer.explain(head, x))
        assert explained.count(f"packed for level {level}") == (8 if level in KEEPING else 0)
        fusedformer.unfuse(head)
        assert all(packed(weight) is None for weight in weights)


def test_what_is_no_weight_of_ours_is_left() -> None:
    module = torch.nn.Sequential(torch.nn.LayerNorm(4), torch.nn.Embedding(3, 4))
    assert freeze(module) == 0
    assert all(packed(parameter) is None for parameter in module.parameters())

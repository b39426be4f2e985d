"""Dropout as a function of (seed, element index): one mask on every kernel backend, in both directions."""

from __future__ import annotations

import pytest
import torch

from fusedformer.functional import dropout_add_layer_norm, dropout_add_rms_norm
from fusedformer.kernels.common import philox
from tests.kernels.norm.cases import Case, make_inputs
from tests.kernels.norm.eager import fused, results
from tests.lanes import every_feature
from tests.tolerances import assert_equal_bits


@every_feature
@pytest.mark.parametrize("features", [1, 7, 40, 1025])
@pytest.mark.parametrize("p", [0.0001, 0.3, 1.0])
def test_the_mask_is_philox(p: float, features: int, backend: str, device: str) -> None:
    """In forward by the sum, in backward by the gradient that the sum alone is sent."""
    seed = torch.tensor([2**32 - 3, 7], device=device)
    x = torch.ones(3, 25, features, device=device, requires_grad=True)
    _, total = dropout_add_rms_norm(x, None, None, dropout_p=p, eps=1.0, return_sum=True, seed=seed, backend=backend)
    (grad,) = torch.autograd.grad(total, x, torch.ones_like(total))
    keep = philox.keep_mask(seed, 1, 75, features, p, philox.STREAM_RESIDUAL).view(x.shape)
    scaled = torch.where(keep, torch.full_like(x, philox.keep_scale(p)), 0.0).detach()
    assert_equal_bits(total.detach(), scaled)
    assert_equal_bits(grad, scaled)


@every_feature
def test_dropped_elements_may_be_anything(backend: str, device: str) -> None:
    seed = torch.tensor([1, 2], device=device)
    keep = philox.keep_mask(seed, 1, 5, 40, 0.3, philox.STREAM_RESIDUAL)[0]
    x, residual = torch.randn(5, 40, device=device), torch.randn(5, 40, device=device)
    options = {"dropout_p": 0.3, "seed": seed, "backend": backend}
    expected = dropout_add_layer_norm(x, residual, None, None, **options)  # type: ignore[call-overload]
    spoiled = x.masked_fill(~keep, float("nan"))
    assert_equal_bits(dropout_add_layer_norm(spoiled, residual, None, None, **options), expected)  # type: ignore[call-overload]


@every_feature
def test_a_seed_repeats_and_another_does_not(backend: str, device: str, seed: int) -> None:
    inputs = make_inputs(Case("", dropout_p=0.5), torch.float32, device, seed)
    first = results(fused(inputs, backend), inputs)
    for name, x in results(fused(inputs, backend), inputs).items():
        assert_equal_bits(x, first[name], name)
    for word in (0, 1):
        other = inputs.options["seed"].clone()
        other[word] ^= 1
        assert not torch.equal(fused(inputs, backend, seed=other)(**inputs.tensors)[0], first["out"])


@every_feature
def test_without_a_seed_torchs_generator_decides(backend: str, device: str, seed: int) -> None:
    inputs = make_inputs(Case("", dropout_p=0.5), torch.float32, device, seed)
    torch.manual_seed(1)
    first, second = (results(fused(inputs, backend, seed=None), inputs) for _ in range(2))
    torch.manual_seed(1)
    again = results(fused(inputs, backend, seed=None), inputs)
    assert not torch.equal(first["out"], second["out"])
    for name, x in again.items():
        assert_equal_bits(x, first[name], name)  # the gradients too: backward regenerates forward's mask


@every_feature
def test_nothing_dropped_is_no_dropout(backend: str, device: str, seed: int) -> None:
    inputs = make_inputs(Case(""), torch.float32, device, seed)
    ignored = torch.zeros(2, dtype=torch.int64, device=device)
    without = results(fused(inputs, backend), inputs)
    for name, x in results(fused(inputs, backend, dropout_p=0.0, seed=ignored), inputs).items():
        assert_equal_bits(x, without[name], name)


def test_torch_draws_its_own_mask() -> None:
    x, residual = torch.randn(5, 40), torch.randn(5, 40)
    torch.manual_seed(1)
    out = dropout_add_layer_norm(x, residual, None, None, dropout_p=0.25, backend="torch")
    torch.manual_seed(1)
    expected = torch.nn.functional.layer_norm(residual + torch.nn.functional.dropout(x, 0.25), (40,))
    assert_equal_bits(out, expected)

"""Dropout as a function of (seed, element index): one mask on every kernel backend, in both directions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fusedformer.functional import feed_forward
from fusedformer.kernels.common import philox
from tests.kernels.feed_forward.cases import Case, make_inputs
from tests.kernels.feed_forward.eager import fused, results
from tests.lanes import every_feature
from tests.tolerances import assert_equal_bits

SIZE = 41


def through(backend: str, x: Tensor, p: float, residual_p: float, seed: Tensor | None, recompute: bool) -> Tensor:
    """Weights and activation that change nothing show the masks themselves."""
    identity, residual = torch.eye(SIZE, device=x.device), torch.zeros_like(x)
    return feed_forward(
        x, identity, identity, dropout_p=p, residual=residual, residual_dropout_p=residual_p, seed=seed,
        recompute=recompute, backend=backend,
    )  # fmt: skip


@every_feature
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("p", "residual_p"), [(0.3, 0.0), (0.0, 0.3), (0.3, 0.2)])
def test_the_masks_are_philox(p: float, residual_p: float, recompute: bool, backend: str, device: str) -> None:
    seed = philox.draw_seed(torch.device(device))
    x = torch.ones(2, 35, SIZE, device=device, requires_grad=True)  # tokens are counted over all leading dimensions
    expected = torch.ones(70, SIZE, device=device)
    for probability, stream in ((p, philox.STREAM_FEED_FORWARD), (residual_p, philox.STREAM_RESIDUAL)):
        keep = philox.keep_mask(seed, 1, 70, SIZE, probability, stream)[0]
        expected = expected * keep * philox.keep_scale(probability)
    out = through(backend, x, p, residual_p, seed, recompute)
    torch.testing.assert_close(out.view(70, SIZE), expected)
    assert torch.equal(out.view(70, SIZE) == 0, expected == 0)
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
    torch.testing.assert_close(grad.view(70, SIZE), expected)


@every_feature
def test_nothing_dropped_is_no_dropout(backend: str, device: str, seed: int) -> None:
    inputs = make_inputs(Case("", residual=True), torch.float32, device, seed)
    without = results(fused(backend), inputs)
    ignored = fused(backend, dropout_p=0.0, seed=torch.zeros(2, dtype=torch.int64, device=device))
    for name, x in results(ignored, inputs).items():
        assert_equal_bits(x, without[name], name)


@every_feature
def test_everything_dropped(backend: str, device: str, seed: int) -> None:
    inputs = make_inputs(Case("", residual=True), torch.float32, device, seed)
    tensors = inputs.tensors
    actual = results(fused(backend, dropout_p=1.0), inputs)
    torch.testing.assert_close(actual["out"], tensors["residual"] + tensors["bias2"])
    torch.testing.assert_close(actual["grad bias2"], inputs.grad_out.sum(0))
    for name in ("input", "weight1", "bias1", "weight2"):
        assert (actual[f"grad {name}"] == 0).all(), name
    actual = results(fused(backend, residual_dropout_p=1.0), inputs)
    assert_equal_bits(actual["out"], tensors["residual"])
    assert_equal_bits(actual["grad residual"], inputs.grad_out)
    for name in ("input", "weight1", "bias1", "weight2", "bias2"):
        assert (actual[f"grad {name}"] == 0).all(), name


@every_feature
def test_a_seed_repeats_and_another_does_not(backend: str, device: str, seed: int) -> None:
    inputs = make_inputs(Case("", leading=(5,), dropout_p=0.5), torch.float32, device, seed)
    first, again = (results(fused(backend), inputs) for _ in range(2))
    for name, x in again.items():
        assert_equal_bits(x, first[name], name)
    for word in (0, 1):
        other = inputs.options["seed"].clone()
        other[word] ^= 1
        assert not torch.equal(fused(backend)(**inputs.tensors, **inputs.options | {"seed": other}), first["out"])


@every_feature
def test_a_seed_of_any_stride(backend: str, device: str) -> None:
    seeds, x = torch.randint(0, 99, (2, 3), device=device), torch.randn(5, SIZE, device=device)
    for column in range(3):
        outs = [through(backend, x, 0.5, 0.0, s, False) for s in (seeds[:, column], seeds[:, column].clone())]
        assert_equal_bits(outs[0], outs[1])


@every_feature
def test_without_a_seed_torchs_generator_decides(backend: str, device: str, seed: int) -> None:
    inputs = make_inputs(Case("", leading=(5,), residual=True), torch.float32, device, seed)
    function = fused(backend, dropout_p=0.5, residual_dropout_p=0.5)
    torch.manual_seed(1)
    first, second = (results(function, inputs) for _ in range(2))
    torch.manual_seed(1)
    again = results(function, inputs)
    assert not torch.equal(first["out"], second["out"])
    for name, x in again.items():
        assert_equal_bits(x, first[name], name)  # the gradients too: backward regenerates forward's masks


def test_torch_draws_its_own_masks() -> None:
    x = torch.randn(9, SIZE)
    torch.manual_seed(1)
    out = through("torch", x, 0.25, 0.5, None, False)
    torch.manual_seed(1)
    assert torch.equal(out, torch.dropout(torch.dropout(x.relu(), 0.25, True), 0.5, True))

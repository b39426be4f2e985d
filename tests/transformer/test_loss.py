"""Sections 5.3 and 5.4: the label-smoothed loss against torch's, and the learning rate's schedule."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusedformer.transformer import loss as loss_module
from fusedformer.transformer.learning_rate import warmup_schedule
from fusedformer.transformer.loss import cross_entropy
from tests.tolerances import assert_within_contract

IGNORED = -100


def drawn(dtype: torch.dtype, tokens: tuple[int, ...], vocabulary: int) -> tuple[Tensor, Tensor]:
    logits = (4 * torch.randn(*tokens, vocabulary)).to(dtype).requires_grad_()
    labels = torch.randint(vocabulary, tokens)
    return logits, labels.masked_fill(torch.rand(tokens) < 0.3, IGNORED).index_fill_(-1, torch.tensor([0]), 1)


def expected(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), label_smoothing=smoothing)


@pytest.mark.parametrize("at_once", [1, 100, 2**20], ids=["row by row", "some rows", "all at once"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_loss_and_gradient_are_torchs(
    smoothing: float, at_once: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(loss_module._AT_ONCE, "cpu", at_once)
    logits, labels = drawn(torch.float32, (3, 7), 37)
    weight = torch.randn(())
    truth_logits, eager_logits = (
        logits.detach().to(dtype).requires_grad_() for dtype in (torch.float64, torch.float32)
    )
    ours, truth, eager = (
        cross_entropy(logits, labels, smoothing),
        expected(truth_logits, labels, smoothing),
        expected(eager_logits, labels, smoothing),
    )
    assert_within_contract(ours, truth, eager, "loss")
    (grad,), (truth_grad,), (eager_grad,) = (
        torch.autograd.grad(weight.to(loss.dtype) * loss, x)
        for loss, x in ((ours, logits), (truth, truth_logits), (eager, eager_logits))
    )
    assert_within_contract(grad, truth_grad, eager_grad, "gradient")
    assert not grad[labels == IGNORED].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bit_logits_are_summed_in_float32(dtype: torch.dtype, seed: int) -> None:
    logits, labels = drawn(dtype, (700,), 53)
    exact = logits.detach().float().requires_grad_()
    truth = exact.detach().double().requires_grad_()
    losses = cross_entropy(logits[None], labels[None], 0.1), expected(truth[None], labels, 0.1)
    loss, eager = losses[0], expected(exact[None], labels, 0.1)
    assert loss.dtype == torch.float32
    assert_within_contract(loss, losses[1], eager, "loss")
    grads = [torch.autograd.grad(*pair)[0] for pair in ((loss, logits), (losses[1], truth), (eager, exact))]
    assert grads[0].dtype == dtype
    assert_within_contract(grads[0], grads[1], grads[2].to(dtype), "gradient")


def test_second_derivative_and_compilation_follow_the_equation(seed: int) -> None:
    logits, labels = drawn(torch.float64, (2, 3), 5)
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, labels, 0.1), logits)
    assert torch.autograd.gradgradcheck(lambda x: cross_entropy(x, labels, 0.1), logits)
    compiled = torch.compile(cross_entropy, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits, labels, 0.1), expected(logits, labels, 0.1))


def test_without_a_label_there_is_no_average() -> None:
    assert cross_entropy(torch.randn(2, 3), torch.full((2,), IGNORED)).isnan()


def test_wrong_arguments_are_named() -> None:
    logits, labels = torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(TypeError, match="logits: got int64"):
        cross_entropy(labels, labels)
    with pytest.raises(TypeError, match="labels: got int32, expected int64"):
        cross_entropy(logits, labels.int())
    with pytest.raises(ValueError, match=r"labels: got shape \(3,\), expected \(2, 3\)"):
        cross_entropy(logits, labels[0])
    with pytest.raises(ValueError, match=r"label_smoothing: got 1\.5"):
        cross_entropy(logits, labels, 1.5)


def test_learning_rate_is_the_papers() -> None:
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=1.0, betas=(0.9, 0.98), eps=1e-9)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_schedule(512, 4))
    rates = []
    for _ in range(9):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    peak = 512**-0.5 * 4**-0.5
    assert rates == pytest.approx([peak * min(step / 4, (4 / step) ** 0.5) for step in range(1, 10)])
    with pytest.raises(ValueError, match="warmup_steps: got 0"):
        warmup_schedule(512, 0)

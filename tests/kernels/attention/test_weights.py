"""The attention weights from the log-sum-exp: equal to the explicit softmax, averaged and per head, and
differentiable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedformer.functional import attention, attention_weights
from fusedformer.kernels.attention.api import attention_with_weights
from tests.cases import Case, Inputs, make_inputs
from tests.kernels.attention.eager import eager_attention
from tests.lanes import every_backend, every_feature
from tests.tolerances import assert_no_mistake, assert_within_contract

CASES = (
    Case("plain", len_k=33),
    Case("causal", is_causal=True, len_k=33, causal_alignment="bottom_right"),
    Case("padding", heads=3, key_mask="bool", len_q=33),
    Case("bias", mask="float 1HLS", key_mask="float"),
    Case("mask", mask="bool BHLS", len_q=1, len_k=65),
    Case("sinks", sinks=True, window=(3, 3)),
    Case("scores", softcap=1.0, alibi="H", scale=0.4),
    Case("dropout", dropout_p=0.3, len_k=33, value_dim=40),
    Case("grouped", heads=4, heads_kv=2, is_causal=True, layout="BLHE"),
)


def weights(inputs: Inputs, average_heads: bool, backend: str, lse: Tensor | None = None) -> Tensor:
    options = {name: x for name, x in inputs.options.items() if name != "sinks"}
    if lse is None:
        _, lse = attention(inputs.query, inputs.key, inputs.value, **inputs.options, backend=backend, return_lse=True)
    return attention_weights(inputs.query, inputs.key, lse, **options, average_heads=average_heads, backend=backend)


def eager_weights(inputs: Inputs, average_heads: bool, attempt: int = 0) -> Tensor:
    explicit = eager_attention(inputs.query, inputs.key, inputs.value, **inputs.options, attempt=attempt)[2]
    return explicit.mean(dim=1) if average_heads else explicit


@every_feature
@pytest.mark.parametrize(
    ("dtype", "average_heads"), [(torch.float32, True), (torch.float32, False), (torch.float16, True)], ids=str
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_weights_hold_the_contract(
    case: Case, dtype: torch.dtype, average_heads: bool, backend: str, device: str, seed: int
) -> None:
    inputs = make_inputs(case, dtype, device, seed)
    actual = weights(inputs, average_heads, backend)
    assert actual.dtype == dtype
    attempts = [eager_weights(inputs, average_heads, attempt) for attempt in range(6)]
    truth = eager_weights(inputs.to(torch.float64), average_heads)
    assert_within_contract(actual, truth, attempts)
    assert (actual[truth == 0] == 0).all()


@every_feature
@pytest.mark.parametrize("average_heads", [True, False], ids=["averaged", "per head"])
def test_empty_rows_have_no_weights(average_heads: bool, backend: str, device: str, seed: int) -> None:
    """pytorch#160064: NaN everywhere when a head sees nothing and the weights are asked for."""
    inputs = make_inputs(Case(""), torch.float32, device, seed)
    nothing = torch.ones(1, 2, 17, 17, dtype=torch.bool, device=device)
    nothing[:, 0] = False
    inputs = replace(inputs, options={"attn_mask": nothing})
    actual = weights(inputs, average_heads, backend)
    if average_heads:
        torch.testing.assert_close(actual.sum(-1), torch.full((2, 17), 0.5, device=device))
    else:
        assert (actual[:, 0] == 0).all()
        torch.testing.assert_close(actual[:, 1].sum(-1), torch.ones(2, 17, device=device))


def gradients(inputs: Inputs, function: Callable[[Inputs], Tensor], seed: int) -> dict[str, Tensor]:
    leaves, named = inputs.leaves()
    del named["value"]  # no weight depends on it
    result = function(leaves)
    sent = torch.randn(result.shape, generator=torch.Generator().manual_seed(seed)).to(result)
    return dict(zip(named, torch.autograd.grad(result, list(named.values()), sent), strict=True))


@every_feature
@pytest.mark.parametrize("average_heads", [True, False], ids=["averaged", "per head"])
@pytest.mark.parametrize("case", [CASES[3], CASES[6], CASES[7]], ids=str)
def test_gradient_of_the_weights(case: Case, average_heads: bool, backend: str, device: str, seed: int) -> None:
    inputs = make_inputs(case, torch.float32, device, seed)
    actual = gradients(inputs, lambda x: weights(x, average_heads, backend), seed)
    truth = gradients(inputs.to(torch.float64), lambda x: eager_weights(x, average_heads), seed)
    for name in actual:
        assert_no_mistake(actual[name], truth[name], name)


@pytest.mark.parametrize("average_heads", [True, False], ids=["averaged", "per head"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradient_of_the_weights_in_float64(case: Case, average_heads: bool, seed: int) -> None:
    inputs = make_inputs(replace(case, sinks=False), torch.float32, "cpu", seed).to(torch.float64)
    actual = gradients(inputs, lambda x: weights(x, average_heads, "reference"), seed)
    expected = gradients(inputs, lambda x: eager_weights(x, average_heads), seed)
    for name, x in actual.items():
        torch.testing.assert_close(x, expected[name])


@every_backend
@pytest.mark.parametrize("average_heads", [True, False], ids=["averaged", "per head"])
@pytest.mark.parametrize("said", ["padding", "bias", "causal", "empty rows"])
def test_output_with_its_weights(said: str, average_heads: bool, backend: str, device: str, seed: int) -> None:
    """What nn.MultiheadAttention asks for, with gradients through both."""
    case = Case("", key_mask="bool" if said == "padding" else "", mask="float 1HLS" if said == "bias" else "")
    inputs = make_inputs(replace(case, is_causal=said == "causal"), torch.float32, device, seed)
    if said == "empty rows":
        inputs.options["key_mask"] = torch.tensor([True, False], device=device)[:, None].expand(2, 17)

    def both(function: Callable[..., tuple[Tensor, Tensor]], inputs: Inputs) -> tuple[Tensor, ...]:
        leaves, named = inputs.leaves()
        out, weights = function(leaves.query, leaves.key, leaves.value, **leaves.options)
        sent = torch.randn(weights.shape, generator=torch.Generator().manual_seed(seed)).to(weights)
        return out, weights, *torch.autograd.grad((out, weights), list(named.values()), (inputs.grad_out, sent))

    def eager(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        out, _, weights = eager_attention(query, key, value, **options)
        return out, weights.mean(dim=1) if average_heads else weights

    actual = both(partial(attention_with_weights, average_heads=average_heads, backend=backend), inputs)
    for x, truth in zip(actual, both(eager, inputs.to(torch.float64)), strict=True):
        assert_no_mistake(x, truth)
    if said == "empty rows":
        assert all((x[1] == 0).all() for x in actual[:3])


@every_backend
def test_output_and_weights_are_of_one_dropout_mask(backend: str, device: str, seed: int) -> None:
    inputs = make_inputs(Case("", key_mask="bool"), torch.float32, device, seed)
    out, weights = attention_with_weights(
        inputs.query, inputs.key, inputs.value, dropout_p=0.4, average_heads=False, backend=backend, **inputs.options
    )
    torch.testing.assert_close(weights @ inputs.value, out)
    dropped = (weights[inputs.options["key_mask"][:, None, None].expand_as(weights)] == 0).double().mean().item()
    assert 0.3 < dropped < 0.5


@every_feature
def test_poisoned_slots_have_weight_zero(backend: str, device: str, seed: int) -> None:
    inputs = make_inputs(Case(""), torch.float32, device, seed)
    keep = torch.ones(2, 17, dtype=torch.bool, device=device)
    keep[:, 5:9] = False
    inputs = replace(inputs, options={"key_mask": keep})
    clean = weights(inputs, True, backend)
    poisoned = replace(inputs, key=inputs.key.clone())
    poisoned.key[:, :, 5:9] = float("nan")
    assert torch.equal(weights(poisoned, True, backend), clean)
    assert (clean[:, :, 5:9] == 0).all()

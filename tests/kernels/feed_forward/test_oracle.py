"""The reference against torch's own layers, and its derivatives against differences."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedformer.functional import feed_forward
from fusedformer.kernels.common import philox
from fusedformer.kernels.common.activations import ACTIVATIONS
from tests.kernels.feed_forward.cases import CASES, Case, make_inputs
from tests.kernels.feed_forward.eager import call, eager_feed_forward, fused, results


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_is_eager_in_float64(case: Case, seed: int) -> None:
    inputs = make_inputs(case, torch.float64, "cpu", seed)
    expected = results(eager_feed_forward, inputs)
    for name, x in results(fused("reference"), inputs).items():
        torch.testing.assert_close(x, expected[name], msg=partial("{}: {}".format, name))


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
def test_the_feed_forward_half_of_torchs_encoder_layer(activation: str, backend: str) -> None:
    layer = torch.nn.TransformerEncoderLayer(24, 2, 40, activation=activation, dtype=torch.float64).eval()
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    weights = (layer.linear1.weight, layer.linear2.weight, layer.linear1.bias, layer.linear2.bias)
    out = feed_forward(x, *weights, activation=activation, backend=backend)
    torch.testing.assert_close(out, layer._ff_block(x))


def test_half_inputs_are_computed_in_float32(seed: int) -> None:
    inputs = make_inputs(Case("", gated=True, activation="gelu", residual=True), torch.bfloat16, "cpu", seed)
    out = fused("reference")(**inputs.tensors, **inputs.options)
    wide = inputs.to(torch.float32)
    torch.testing.assert_close(
        out, fused("reference")(**wide.tensors, **wide.options).bfloat16(), rtol=2**-8, atol=1e-30
    )


# ---- the table


def test_the_table_is_numbered_in_order() -> None:
    assert list(ACTIVATIONS) == ["relu", "gelu", "gelu_tanh", "silu", "relu2"]
    assert [row.number for row in ACTIVATIONS.values()] == list(range(len(ACTIVATIONS)))


FORMULAS = {
    "relu": lambda x: x.clamp(min=0),
    "gelu": lambda x: x * torch.special.ndtr(x),
    "gelu_tanh": lambda x: x / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "relu2": lambda x: x.clamp(min=0) * x.clamp(min=0),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_table_holds_the_formulas(name: str) -> None:
    x = torch.linspace(-9, 9, 1001, dtype=torch.float64)
    torch.testing.assert_close(ACTIVATIONS[name].function(x), FORMULAS[name](x))


# ---- dropout


def test_dropout_multiplies_hidden_features_and_results() -> None:
    seed = torch.tensor([11, 13])
    x, identity = torch.rand(9, 24) + 1.0, torch.eye(24)
    inner = feed_forward(x, identity, identity, dropout_p=0.4, seed=seed, backend="reference")
    keep = philox.keep_mask(seed, 1, 9, 24, 0.4, philox.STREAM_FEED_FORWARD)[0]
    torch.testing.assert_close(inner, x * keep * philox.keep_scale(0.4))
    residual = torch.randn(9, 24)
    both = feed_forward(
        x, identity, identity, residual=residual, residual_dropout_p=0.4, seed=seed, backend="reference"
    )
    keep = philox.keep_mask(seed, 1, 9, 24, 0.4, philox.STREAM_RESIDUAL)[0]
    torch.testing.assert_close(both, residual + x * keep * philox.keep_scale(0.4))


# ---- derivatives

FEATURES: dict[str, dict[str, Any]] = {
    "plain": {"activation": "silu"},
    "no bias": {"activation": "gelu_tanh", "without": ("bias1", "bias2")},
    "relu": {"activation": "relu"},
    "relu2": {"activation": "relu2"},
    "gated": {"activation": "gelu", "gated": True},
    "residual": {"activation": "silu", "residual": True, "residual_dropout_p": 0.5},
    "together": {"activation": "gelu", "gated": True, "residual": True, "dropout_p": 0.3, "residual_dropout_p": 0.2},
}


@pytest.mark.parametrize("feature", FEATURES)
def test_derivatives_of_first_and_second_order(feature: str, seed: int) -> None:
    case = Case("", leading=(2, 2), d_in=3, d_ff=4, d_out=2, **FEATURES[feature])
    inputs = make_inputs(case, torch.float64, "cpu", seed)
    while any((x.abs() < 1e-3).any() for x in pre_activations(inputs.tensors)):  # differences would step over a kink
        inputs = make_inputs(case, torch.float64, "cpu", seed := seed + 1)
    inputs = inputs.leaves()

    def function(*tensors: Tensor) -> Tensor:
        named = dict(zip(inputs.tensors, tensors, strict=True))
        return call(**named, **inputs.options, backend="reference")

    primals = tuple(inputs.tensors.values())
    assert torch.autograd.gradcheck(function, primals)
    assert torch.autograd.gradgradcheck(function, primals, fast_mode=True)


def pre_activations(tensors: dict[str, Tensor]) -> list[Tensor]:
    pairs = [("weight1", "bias1"), ("gate_weight", "gate_bias")]
    return [
        torch.nn.functional.linear(tensors["input"], tensors[weight], tensors.get(bias))
        for weight, bias in pairs
        if weight in tensors
    ]

"""The oracle itself: the reference against float64, against torch's own attentions, and its derivatives against
differences."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import flex_attention

from tests.cases import CASES, Case, Inputs, make_inputs
from tests.kernels.attention.eager import assert_results_within_contract, call, eager, fused, results

sdpa = torch.nn.functional.scaled_dot_product_attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_holds_the_contract(case: Case, dtype: torch.dtype, seed: int) -> None:
    inputs = make_inputs(case, dtype, "cpu", seed)
    assert_results_within_contract(results(fused("reference"), inputs), inputs)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_in_float64(case: Case, seed: int) -> None:
    inputs = make_inputs(case, torch.float32, "cpu", seed).to(torch.float64)
    actual, expected = results(fused("reference"), inputs), results(eager(), inputs)
    for name, x in actual.items():
        assert x.dtype == torch.float64, name
        torch.testing.assert_close(x, expected[name], msg=partial("{}: {}".format, name))


def doubles(
    len_q: int = 17, len_k: int = 17, heads: int = 2, heads_kv: int | None = None, value_dim: int = 8
) -> Inputs:
    heads_kv = heads_kv or heads
    query, key, value, grad_out = (
        torch.randn(2, h, length, dim, dtype=torch.float64)
        for h, length, dim in (
            (heads, len_q, 8), (heads_kv, len_k, 8), (heads_kv, len_k, value_dim), (heads, len_q, value_dim)
        )
    )  # fmt: skip
    return Inputs(query, key, value, grad_out, torch.randn(2, heads, len_q, dtype=torch.float64))


def assert_same(ours: Callable[..., Any], theirs: Callable[..., Any], inputs: Inputs) -> None:
    """Both functions of (query, key, value): equal results, and equal gradients."""
    found = []
    for function in (ours, theirs):
        leaves, named = inputs.leaves()
        results = function(leaves.query, leaves.key, leaves.value)
        results = results if isinstance(results, tuple) else (results,)
        sent = (inputs.grad_out, inputs.grad_lse)[: len(results)]
        found.append((*results, *torch.autograd.grad(results, list(named.values()), sent)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def reference(**options: Any) -> Callable[..., Any]:
    return lambda q, k, v: call(q, k, v, **options, backend="reference")


SDPA_SHAPES = [{}, {"len_k": 33}, {"len_q": 33, "value_dim": 5}]


@pytest.mark.parametrize("shape", SDPA_SHAPES, ids=str)
@pytest.mark.parametrize("said", ["nothing", "causal", "scale", "bool", "float", "row"])
def test_torchs_attention(said: str, shape: dict[str, int]) -> None:
    inputs = doubles(**shape)
    len_q, len_k = inputs.query.size(2), inputs.key.size(2)
    options: dict[str, dict[str, Any]] = {
        "nothing": {},
        "causal": {"is_causal": True},
        "scale": {"scale": 0.2},
        "bool": {"attn_mask": torch.rand(2, 1, len_q, len_k) > 0.2},
        "float": {"attn_mask": torch.randn(1, 2, len_q, len_k, dtype=torch.float64)},
        "row": {"attn_mask": torch.randn(2, 1, 1, len_k, dtype=torch.float64)},
    }
    given = options[said]
    assert_same(reference(**given), lambda q, k, v: sdpa(q, k, v, **given), inputs)


@pytest.mark.parametrize("heads_kv", [1, 2, 4])
def test_torchs_grouped_attention(heads_kv: int) -> None:
    inputs = doubles(heads=4, heads_kv=heads_kv)
    assert_same(reference(enable_gqa=True), lambda q, k, v: sdpa(q, k, v, enable_gqa=True), inputs)


@pytest.mark.parametrize("lengths", [(9, 17), (17, 17)])
def test_torchs_lower_right_causality(lengths: tuple[int, int]) -> None:
    bias = causal_lower_right(*lengths)
    ours = reference(is_causal=True, causal_alignment="bottom_right")
    assert_same(ours, lambda q, k, v: sdpa(q, k, v, attn_mask=bias), doubles(*lengths))


SLOPES = torch.tensor([0.5, 0.25], dtype=torch.float64)


# torch's score_mod, told how far before the query's position the key stands instead of their indices.
FLEX: dict[str, tuple[dict[str, Any], Callable[..., Tensor]]] = {
    "softcap": ({"softcap": 0.7}, lambda score, h, back: 0.7 * torch.tanh(score / 0.7)),
    "alibi": ({"alibi_slopes": SLOPES}, lambda score, h, back: score - SLOPES[h] * back.abs()),
    "window": ({"window": (5, 2)}, lambda score, h, back: score.where((back >= -2) & (back <= 5), -torch.inf)),
    "causal": ({"is_causal": True}, lambda score, h, back: score.where(back >= 0, -torch.inf)),
    "all in order": (
        {"softcap": 0.7, "alibi_slopes": SLOPES, "is_causal": True, "window": (9, 9)},
        lambda score, h, back: (0.7 * torch.tanh(score / 0.7) - SLOPES[h] * back.abs()).where(
            (back >= 0) & (back <= 9), -torch.inf
        ),
    ),
}


@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
@pytest.mark.parametrize("name", FLEX)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_torchs_flex_attention(name: str, alignment: str) -> None:
    """Softcap, ALiBi, windows, their order and their positions, and the log-sum-exp, by torch's programmable attention.

    It has no backward on the CPU; differences stand in for it below.
    """
    options, score_mod = FLEX[name]
    offset = 33 - 17 if alignment == "bottom_right" else 0
    inputs = doubles(17, 33)
    tensors = (inputs.query, inputs.key, inputs.value)
    out, lse = reference(**options, causal_alignment=alignment, return_lse=True)(*tensors)
    modified = lambda score, b, h, i, j: score_mod(score, h, i + offset - j)
    expected_out, expected_lse = flex_attention(*tensors, modified, return_lse=True)
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(lse.float(), expected_lse.float())


def test_a_sink_is_a_key_without_a_value() -> None:
    inputs = doubles()
    sinks = torch.randn(2, dtype=torch.float64)

    def with_one_more_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = torch.cat((sinks[:, None, None].expand(2, 17, 1), torch.zeros(2, 17, 17)), dim=-1)
        k, v = (torch.nn.functional.pad(x, (0, 0, 1, 0)) for x in (k, v))
        return sdpa(q, k, v, bias)

    assert_same(reference(sinks=sinks), with_one_more_key, inputs)


FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True, "causal_alignment": "bottom_right"},
    "padding": {"key_mask": torch.tensor([[True, True, False], [False, False, False]])},
    "bias": {"attn_mask": (1, 2, 4, 3)},
    "bias per key": {"attn_mask": (2, 1, 1, 3)},
    "bias per query": {"attn_mask": (2, 4, 1)},
    "key bias": {"key_mask": (2, 3)},
    "window": {"window": (1, 1)},
    "softcap": {"softcap": 1.0},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.3])},
    "sinks": {"sinks": (2,)},
    "dropout": {"dropout_p": 0.5, "seed": torch.tensor([5, 7])},
    "together": {
        "is_causal": True, "causal_alignment": "bottom_right", "attn_mask": (1, 2, 4, 3), "key_mask": (2, 3),
        "softcap": 2.0, "sinks": (2,), "dropout_p": 0.3, "seed": torch.tensor([1, 2]), "window": (2, None),
    },
}  # fmt: skip


@pytest.mark.parametrize("feature", FEATURES)
def test_derivatives_of_first_and_second_order(feature: str) -> None:
    """L = 4 > S = 3, so that bottom-right causality has an empty row; grouped heads, Ev != E."""
    shapes = {"query": (2, 2, 4, 2), "key": (2, 1, 3, 2), "value": (2, 1, 3, 3)}
    shapes |= {name: option for name, option in FEATURES[feature].items() if name in ("attn_mask", "key_mask", "sinks")
               and isinstance(option, tuple)}  # fmt: skip
    primals = {name: torch.randn(shape, dtype=torch.float64, requires_grad=True) for name, shape in shapes.items()}
    options = {name: option for name, option in FEATURES[feature].items() if name not in primals}

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(primals, tensors, strict=True))
        out, lse = call(**named, **options, enable_gqa=True, backend="reference", return_lse=True)
        return out, lse.masked_fill(lse == -torch.inf, 0.0)  # differences of infinities are not numbers

    assert torch.autograd.gradcheck(function, tuple(primals.values()))
    assert torch.autograd.gradgradcheck(function, tuple(primals.values()), fast_mode=True)

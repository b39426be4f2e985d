"""Bad arguments: the message names the argument, what came and what was expected, before any work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fusedformer.functional import attention, attention_weights, scaled_dot_product_attention

B, H, L, S, E = 2, 4, 5, 7, 8


def tensors(**replaced: Any) -> dict[str, Any]:
    return {
        "query": torch.randn(B, H, L, E),
        "key": torch.randn(B, H, S, E),
        "value": torch.randn(B, H, S, E),
    } | replaced


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    # type and layout
    ({"query": [1.0]}, TypeError, "query: got list, expected a Tensor"),
    ({"key": None}, TypeError, "key: got NoneType, expected a Tensor"),
    ({"value": torch.randn(B, H, S, E).to_sparse()}, TypeError, "value: got a nested or sparse tensor, expected"),
    ({"key": torch.nested.nested_tensor([torch.randn(2, 3)])}, TypeError, "key: got a nested or sparse tensor"),
    ({"key": torch.randn(B, H, S, E, device="meta")}, ValueError, "key: got a tensor on meta, expected cpu"),
    # dtype
    ({"query": torch.ones(B, H, L, E, dtype=torch.int64)}, TypeError, "query: got int64, expected one of float32"),
    ({"query": torch.ones(B, H, L, E, dtype=torch.complex64)}, TypeError, "query: got complex64, expected one of"),
    ({"key": torch.randn(B, H, S, E).half()}, TypeError, "key: got float16, expected float32"),
    ({"value": torch.randn(B, H, S, E).double()}, TypeError, "value: got float64, expected float32"),
    # shape
    ({"query": torch.randn(H, L, E)}, ValueError, r"query: got shape \(4, 5, 8\), expected 4 dimensions \(batch"),
    ({"key": torch.randn(1, B, H, S, E)}, ValueError, "key: got shape .*, expected 4 dimensions"),
    ({"value": torch.randn(S, E)}, ValueError, r"value: got shape \(7, 8\), expected 4 dimensions"),
    ({"query": torch.randn(B, H, L, 0), "key": torch.randn(B, H, S, 0)}, ValueError,
     "query: got .*, expected a head dim of at least 1"),
    ({"key": torch.randn(3, H, S, E)}, ValueError, r"key: got shape \(3, .*expected .* = \(2, Hkv, S, 8\)"),
    ({"key": torch.randn(B, H, S, 9)}, ValueError, r"key: got shape .*9\), expected .* = \(2, Hkv, S, 8\)"),
    ({"value": torch.randn(B, H, 6, E)}, ValueError, r"value: got shape \(2, 4, 6, 8\), expected .* = \(2, 4, 7, Ev\)"),
    ({"value": torch.randn(B, 2, S, E)}, ValueError, r"value: got shape \(2, 2, 7, 8\), expected .* = \(2, 4, 7, Ev\)"),
    ({"value": torch.randn(B, H, S, 0)}, ValueError, r"value: got shape \(2, 4, 7, 0\), expected"),
    # heads
    ({"key": torch.randn(B, 2, S, E), "value": torch.randn(B, 2, S, E)}, ValueError,
     "key: got 2 heads for 4 query heads, expected as many, or enable_gqa=True"),
    ({"key": torch.randn(B, 3, S, E), "value": torch.randn(B, 3, S, E), "enable_gqa": True}, ValueError,
     "key: got 3 heads, expected a number that divides the 4 query heads"),
    ({"key": torch.randn(B, 0, S, E), "value": torch.randn(B, 0, S, E), "enable_gqa": True}, ValueError,
     "key: got 0 heads, expected a number that divides the 4 query heads"),
    # masks
    ({"attn_mask": [[True]]}, TypeError, "attn_mask: got list, expected a Tensor"),
    ({"attn_mask": torch.ones(L, S, dtype=torch.int32)}, TypeError, "attn_mask: got int32, expected bool .* or a"),
    ({"attn_mask": torch.ones(L, S + 1)}, ValueError, r"attn_mask: got shape \(1, 1, 5, 8\), exp.*\(2, 4, 5, 7\)"),
    ({"attn_mask": torch.ones(3, 1, L, S)}, ValueError, r"attn_mask: got shape \(3, 1, 5, 7\), exp.*\(2, 4, 5, 7\)"),
    ({"attn_mask": torch.ones(1, 1, 1, L, S)}, ValueError, "attn_mask: got shape .*, expected at most 4 dimensions"),
    ({"attn_mask": torch.ones(L, S, device="meta")}, ValueError, "attn_mask: got a tensor on meta, expected cpu"),
    ({"key_mask": torch.ones(B, S, dtype=torch.int64)}, TypeError, "key_mask: got int64, expected bool"),
    ({"key_mask": torch.ones(B, L)}, ValueError, r"key_mask: got shape \(2, 5\), expected \(B, S\) = \(2, 7\)"),
    ({"key_mask": torch.ones(S)}, ValueError, r"key_mask: got shape \(7,\), expected \(B, S\) = \(2, 7\)"),
    ({"key_mask": torch.ones(B, S, device="meta")}, ValueError, "key_mask: got a tensor on meta, expected cpu"),
    # numbers and names
    ({"dropout_p": -0.1}, ValueError, r"dropout_p: got -0.1, expected a probability in \[0, 1\]"),
    ({"dropout_p": 1.5}, ValueError, "dropout_p: got 1.5"),
    ({"dropout_p": float("nan")}, ValueError, "dropout_p: got nan"),
    ({"dropout_p": "0.1"}, TypeError, "dropout_p: got str, expected a number"),
    ({"scale": torch.tensor(0.5)}, TypeError, "scale: got Tensor, expected a number"),
    ({"softcap": "30"}, TypeError, "softcap: got str, expected a number"),
    ({"softcap": float("nan")}, ValueError, "softcap: got nan, expected a positive number, or None"),
    ({"softcap": -1.0}, ValueError, "softcap: got -1.0, expected a positive number, or None"),
    ({"precision": "fp32"}, ValueError, "precision: got 'fp32', expected one of .*'ieee', 'tf32'"),
    ({"causal_alignment": "left"}, ValueError, "causal_alignment: got 'left', expected .top_left. or .bottom_right."),
    ({"window": (1, 2, 3)}, ValueError, r"window: got \(1, 2, 3\), expected \(left, right\)"),
    ({"window": 3}, ValueError, r"window: got 3, expected \(left, right\)"),
    ({"window": (1.5, 0)}, TypeError, r"window: got \(1.5, 0\), expected whole numbers of keys, or None"),
    ({"window": (-2, 0)}, ValueError, r"window: got \(-2, 0\), expected sizes of at least 0, or None or -1"),
    ({"backend": "cudnn"}, ValueError, "backend: got 'cudnn', expected one of .*'auto'.*'triton'"),
    # per head
    ({"alibi_slopes": torch.ones(3)}, ValueError, r"alibi_slopes: got shape \(3,\), expected \(H,\) = \(4,\)"),
    ({"alibi_slopes": torch.ones(3, H)}, ValueError, r"alibi_slopes: got shape \(3, 4\), expected .* = \(2, 4\)"),
    ({"alibi_slopes": torch.ones(H, dtype=torch.int64)}, TypeError, "alibi_slopes: got int64, expected one of float32"),
    ({"alibi_slopes": torch.ones(H, requires_grad=True)}, ValueError, "alibi_slopes: got a tensor that requires a"),
    ({"sinks": torch.ones(B, H)}, ValueError, r"sinks: got shape \(2, 4\), expected \(H,\) = \(4,\)"),
    ({"sinks": torch.ones(H, dtype=torch.bool)}, TypeError, "sinks: got bool, expected one of float32"),
    ({"sinks": 1.0}, TypeError, "sinks: got float, expected a Tensor"),
    # seed
    ({"dropout_p": 0.1, "seed": 7}, TypeError, "seed: got int, expected a Tensor"),
    ({"dropout_p": 0.1, "seed": torch.zeros(2)}, TypeError, r"seed: got float32 of shape \(2,\), expected an int64"),
    ({"dropout_p": 0.1, "seed": torch.zeros(3, dtype=torch.int64)}, TypeError, r"seed: got int64 of shape \(3,\)"),
]  # fmt: skip


@pytest.mark.parametrize(("bad", "error", "message"), BAD, ids=[message.split(",")[0] for _, _, message in BAD])
def test_a_bad_argument_is_named(bad: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        attention(**tensors(**bad))


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (
            {"lse": torch.zeros(B, H, L + 1)},
            ValueError,
            r"lse: got shape \(2, 4, 6\), expected \(B, H, L\) = \(2, 4, 5\)",
        ),
        ({"lse": None}, TypeError, "lse: got NoneType, expected a Tensor"),
        ({"dropout_p": 0.1}, ValueError, "seed: got None, expected the seed that attention was given"),
        ({"query": torch.randn(H, L, E)}, ValueError, "query: got shape .*, expected 4 dimensions"),
        ({"key_mask": torch.ones(S)}, ValueError, r"key_mask: got shape \(7,\)"),
    ],
)
def test_a_bad_argument_of_the_weights_is_named(bad: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"query": torch.randn(B, H, L, E), "key": torch.randn(B, H, S, E), "lse": torch.zeros(B, H, L)}
    with pytest.raises(error, match=message):
        attention_weights(**given | bad)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"attn_mask": torch.ones(L, S), "is_causal": True}, ValueError, "attn_mask: got one together with is_causal"),
        ({"query": torch.randn(E)}, ValueError, r"query: got shape \(8,\), expected at least 2 dimensions"),
        ({"key": "key"}, TypeError, "key: got str, expected a Tensor"),
        ({"key": torch.randn(3, H, S, E)}, ValueError, "query, key, value: got shapes .*, expected leading dim"),
        ({"query": torch.randn(3, B, H, L, E), "attn_mask": torch.ones(1, 1, 1, 1, L, S)}, ValueError,
         "attn_mask: got shape .*, expected at most 5 dimensions"),
        ({"query": torch.randn(3, B, H, L, E), "attn_mask": torch.ones(2, B, H, L, S)}, ValueError,
         r"attn_mask: got shape \(2, 2, 4, 5, 7\), expected .* = \(3, 2, 4, 5, 7\)"),
        ({"attn_mask": 3}, TypeError, "attn_mask: got int, expected a Tensor"),
    ],
)  # fmt: skip
def test_a_bad_argument_of_sdpa_is_named(bad: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        scaled_dot_product_attention(**tensors(**bad))


def broadcast_options() -> list[dict[str, Any]]:
    return [{}, {"is_causal": True}, {"scale": 0.5}, {"mask": "LS"}, {"mask": "1S"}, {"mask": "full"}, {"mask": "bool"}]


@pytest.mark.parametrize("option", broadcast_options(), ids=str)
@pytest.mark.parametrize(
    ("shape_q", "shape_kv"),
    [
        ((L, E), (S, E)),
        ((H, L, E), (H, S, E)),
        ((B, H, L, E), (B, H, S, E)),
        ((3, B, H, L, E), (3, B, H, S, E)),
        ((2, 1, 3, B, L, E), (2, 1, 3, B, S, E)),
        ((3, B, H, L, E), (1, H, S, E)),
        ((B, 1, L, E), (1, H, S, E)),
    ],
)
def test_any_leading_dimensions_as_in_torch(
    shape_q: tuple[int, ...], shape_kv: tuple[int, ...], option: dict[str, Any]
) -> None:
    query, key, value = (torch.randn(shape, dtype=torch.float64) for shape in (shape_q, shape_kv, shape_kv))
    leading = torch.broadcast_shapes(shape_q[:-2], shape_kv[:-2])
    masks: dict[str, Tensor] = {
        "LS": torch.randn(L, S, dtype=torch.float64),
        "1S": torch.randn(1, S, dtype=torch.float64),
        "full": torch.randn(*leading, L, S, dtype=torch.float64),
        "bool": torch.rand(*leading[:-1], *leading[-1:], L, S) > 0.3,
    }
    options = {"attn_mask": masks[option["mask"]]} if "mask" in option else option
    actual = scaled_dot_product_attention(query, key, value, **options)
    # torch's own does not broadcast the leading dimensions on every path; expanded they say the same.
    query, key, value = (x.expand(*leading, *x.shape[-2:]) for x in (query, key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, **options)
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("leading", [(), (B,), (3, B)])
def test_grouped_heads_with_any_leading_dimensions(leading: tuple[int, ...]) -> None:
    query = torch.randn(*leading, 4, L, E, dtype=torch.float64)
    key, value = (torch.randn(*leading, 2, S, E, dtype=torch.float64) for _ in range(2))
    actual = scaled_dot_product_attention(query, key, value, enable_gqa=True)
    key, value = (x.repeat_interleave(2, dim=-3) for x in (key, value))
    torch.testing.assert_close(actual, torch.nn.functional.scaled_dot_product_attention(query, key, value))


def test_sdpa_gradient_of_a_mask_with_leading_dimensions() -> None:
    query, key, value = (torch.randn(3, B, H, n, E, dtype=torch.float64) for n in (L, S, S))
    masks = [torch.randn(B, 1, L, S, dtype=torch.float64), torch.randn(3, 1, H, 1, S, dtype=torch.float64)]
    for mask in masks:
        mask.requires_grad_()
        ours, theirs = (
            torch.autograd.grad(function(query, key, value, mask).square().sum(), mask)[0]
            for function in (scaled_dot_product_attention, torch.nn.functional.scaled_dot_product_attention)
        )
        assert ours.shape == mask.shape
        torch.testing.assert_close(ours, theirs)


def test_sdpa_dropout_is_applied_whenever_positive() -> None:
    query, key = torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 4096, 8)
    out = scaled_dot_product_attention(query, key, torch.ones(1, 1, 4096, 8), dropout_p=0.5)
    assert out.unique().numel() == 1
    assert 0.8 < out.mean() < 1.2
    assert out.mean() != 1.0


def test_sdpa_has_torchs_parameters() -> None:
    import inspect

    ours = inspect.signature(scaled_dot_product_attention).parameters
    names = ["query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"]
    assert list(ours) == names
    defaults = {name: ours[name].default for name in names[3:]}
    assert defaults == {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}


def test_mask_and_causality_both_apply() -> None:
    query, key, value = (torch.randn(B, H, L, E, dtype=torch.float64) for _ in range(3))
    mask = torch.randn(L, L, dtype=torch.float64)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, mask.masked_fill(torch.ones(L, L).triu(1).bool(), float("-inf"))
    )
    torch.testing.assert_close(attention(query, key, value, mask, is_causal=True), expected)


@pytest.mark.parametrize("open_side", [None, -1])
def test_an_open_window_is_none(open_side: int | None) -> None:
    query, key, value = (torch.randn(B, H, L, E) for _ in range(3))
    both = attention(query, key, value, window=(open_side, open_side), backend="reference")
    assert torch.equal(both, attention(query, key, value, backend="reference"))
    causal = attention(query, key, value, window=(open_side, 0), backend="reference")
    assert torch.equal(causal, attention(query, key, value, is_causal=True, backend="reference"))


def test_torchs_other_functions_come_through() -> None:
    from fusedformer import functional

    assert functional.relu is torch.nn.functional.relu
    assert "gelu" in dir(functional)
    with pytest.raises(AttributeError, match="no_such_function"):
        functional.no_such_function  # noqa: B018

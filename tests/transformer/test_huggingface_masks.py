"""What transformers calls: compact masks mean what whole ones do, no argument is lost."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    sdpa_mask,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

from fusedformer.transformer.huggingface import compact_mask, fused_attention


class Layer(torch.nn.Module):
    def __init__(self, **attributes: bool) -> None:
        super().__init__()
        self.__dict__.update(attributes)


CAUSAL, BIDIRECTIONAL = Layer(is_causal=True), Layer(is_causal=False)
BATCH = 3
WHOLE_ALONE = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}


def padding_of(kind: str, length: int) -> Tensor | None:
    """What a model prepares from its attention mask: bool (B, length), True where no padding is."""
    if kind == "none":
        return None
    pad = torch.tensor([[0], [length // 3], [length // 2]])
    return torch.arange(length) >= pad if kind == "left" else torch.arange(length) < length - pad


def states(len_q: int, len_k: int) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((BATCH, 4, len_q, 6), (BATCH, 2, len_k, 6), (BATCH, 2, len_k, 5))
    query, key, value = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return query, key, value


def ask(kind: str, window: int | None) -> dict[str, Any]:
    """What transformers' ``create_..._mask`` functions say to a mask function."""
    if kind == "bidirectional":
        skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": True}
        return {"mask_function": bidirectional_mask_function, **skips}
    config = SimpleNamespace(sliding_window=window)
    if kind == "causal":
        return {"mask_function": causal_mask_function, "config": config}
    assert window is not None
    return {"mask_function": sliding_window_causal_mask_function(window), "local_size": window, "config": config}


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize(
    ("kind", "window"),
    [("causal", None), ("causal", 3), ("sliding", 1), ("sliding", 3), ("sliding", 99), ("bidirectional", None)],
)
@pytest.mark.parametrize(
    ("len_q", "past", "dropped"),
    [(7, 0, 0), (1, 0, 0), (1, 6, 0), (4, 5, 0), (4, 9, 6), (1, 9, 7)],
    ids=["prefill", "one", "decode", "chunk", "chunk after a window", "decode after a window"],
)
def test_a_compact_mask_says_what_the_whole_one_does(
    kind: str, window: int | None, padding: str, len_q: int, past: int, dropped: int
) -> None:
    len_k = past + len_q - dropped
    lengths = {"q_length": len_q, "kv_length": len_k, "q_offset": past, "kv_offset": dropped}
    arguments = {
        "batch_size": BATCH,
        **lengths,
        "attention_mask": padding_of(padding, past + len_q),
        **ask(kind, window),
    }
    mask = compact_mask(**arguments)
    whole = sdpa_mask(**{**arguments, **WHOLE_ALONE})
    assert mask is None or mask.untyped_storage().nbytes() <= BATCH * (past + len_q)
    if padding == "none" and (kind == "bidirectional" or (len_k <= (window or len_k) and len_q in (1, len_k))):
        assert mask is None
    layer = BIDIRECTIONAL if kind == "bidirectional" else CAUSAL
    query, key, value = states(len_q, len_k)
    actual, weights = fused_attention(layer, query, key, value, mask)
    assert weights is None
    assert actual.is_contiguous()
    torch.testing.assert_close(actual, fused_attention(layer, query, key, value, whole)[0])
    # The whole mask is read as it is, whatever the layer says.
    other = CAUSAL if kind == "bidirectional" else BIDIRECTIONAL
    torch.testing.assert_close(actual, fused_attention(other, query, key, value, whole)[0])
    if mask is not None and mask.dtype != torch.bool:
        assert mask.dim() == 4
        last = fused_attention(layer, query[:, :, -1:], key, value, mask[:, :, -1:, :])[0]
        torch.testing.assert_close(last, actual[:, -1:])


WHOLE: dict[str, dict[str, Any]] = {
    "static cache": {"kv_length": 12},
    "static cache, later": {"kv_length": 12, "q_offset": 3},
    "an offset on the device": {"kv_length": 12, "q_offset": torch.tensor(7)},
    "an overlay": {"allow_is_causal_skip": False},
    "another function": {"mask_function": lambda b, h, q, k: (k <= q) | (k % 2 == 0)},
    "chunks": {
        "mask_function": chunked_causal_mask_function(3, torch.zeros(BATCH, dtype=torch.long)),
        "local_size": 3,
        "config": SimpleNamespace(attention_chunk_size=3, sliding_window=None),
    },
    "chunks of a window's size": {
        "mask_function": chunked_causal_mask_function(3, torch.zeros(BATCH, dtype=torch.long)),
        "local_size": 3,
        "config": SimpleNamespace(attention_chunk_size=3, sliding_window=3),
    },
    "window both ways": {
        "mask_function": sliding_window_bidirectional_mask_function(2),
        "local_size": 2,
        "allow_is_causal_skip": False,
        "allow_is_bidirectional_skip": True,
        "config": SimpleNamespace(sliding_window=2),
    },
    "bidirectional, to be joined with another": {
        "mask_function": bidirectional_mask_function,
        "allow_is_causal_skip": False,
    },
}


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("changes", WHOLE.values(), ids=WHOLE)
def test_all_else_gets_the_whole_mask(changes: dict[str, Any], padding: str) -> None:
    arguments = {
        "batch_size": BATCH,
        "q_length": 5,
        "kv_length": 5,
        "attention_mask": padding_of(padding, 5),
        **changes,
    }
    expected = sdpa_mask(**{**arguments, **WHOLE_ALONE})
    actual = compact_mask(**arguments)
    assert actual is not None
    assert expected is not None
    assert actual.dtype == torch.bool
    assert torch.equal(actual.expand_as(expected), expected)


def test_a_padding_mask_is_cut_or_padded_to_the_keys() -> None:
    padding = torch.arange(4) >= torch.tensor([[0], [1], [2]])
    longer = compact_mask(BATCH, 2, 6, 4, attention_mask=padding)
    assert longer is not None
    assert longer[:, 0, 0, 4:].eq(0).all()
    assert torch.equal(longer[:, 0, 0, :4].bool(), padding)
    cut = compact_mask(BATCH, 2, 2, 1, 1, attention_mask=padding)
    assert cut is not None
    assert torch.equal(cut[:, 0, 0].bool(), padding[:, 1:3])


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    added: Tensor | float,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    key, value = (x.repeat_interleave(2, dim=1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + added
    if sinks is not None:
        sink = sinks[None, :, None, None].expand(*scores.shape[:-1], 1)
        weights = torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1)[..., :-1]
    else:
        weights = torch.softmax(scores, dim=-1)
    return (weights @ value).transpose(1, 2), weights


@pytest.mark.parametrize("mask", ["none", "compact", "bool", "float", "row", "row per head"])
@pytest.mark.parametrize("feature", ["plain", "softcap", "s_aux", "position_bias"])
def test_every_argument_counts(mask: str, feature: str) -> None:
    len_q, len_k = (7, 7) if mask in ("none", "compact") else (7, 9)
    query, key, value = states(len_q, len_k)
    visible = torch.ones(BATCH, 1, len_q, len_k, dtype=torch.bool).tril(len_k - len_q)
    given: Tensor | None = None
    if mask == "compact":
        given = compact_mask(BATCH, len_q, len_k, attention_mask=padding_of("right", len_k))
        visible = visible & padding_of("right", len_k)[:, None, None]  # type: ignore[index]
    elif mask == "bool":
        given = visible = visible & (torch.rand(BATCH, 4, len_q, len_k) < 0.8).index_fill(3, torch.tensor([0]), True)
    elif mask == "float":
        given = torch.randn(BATCH, 1, len_q, len_k).double()
    elif mask == "row":
        given = visible = padding_of("left", len_k)[:, None, None]  # type: ignore[index]
    elif mask == "row per head":
        given = visible = (torch.rand(BATCH, 4, 1, len_k) < 0.7).index_fill(3, torch.tensor([0]), True)
    added: Any = given if mask == "float" else torch.zeros(()).double().masked_fill(~visible, float("-inf"))
    options: dict[str, Any] = {}
    if feature == "softcap":
        options["softcap"] = 1.5
    elif feature == "s_aux":
        options["s_aux"] = torch.randn(4, dtype=torch.float64, requires_grad=True)
    elif feature == "position_bias":
        options["position_bias"] = torch.randn(1, 4, len_q, len_k, dtype=torch.float64, requires_grad=True)
        added = added + options["position_bias"]
    leaves = [x.requires_grad_() for x in (query, key, value)] + [x for x in options.values() if isinstance(x, Tensor)]
    expected = plain_attention(query, key, value, added, 0.7, options.get("softcap"), options.get("s_aux"))
    actual = fused_attention(CAUSAL, query, key, value, given, scaling=0.7, output_attentions=True, **options)
    torch.testing.assert_close(actual, expected)
    without = fused_attention(CAUSAL, query, key, value, given, scaling=0.7, **options)[0]
    torch.testing.assert_close(without, expected[0])
    gradient = torch.randn_like(without)
    grads = (torch.autograd.grad((out * gradient).sum(), leaves) for out in (without, expected[0]))
    torch.testing.assert_close(*grads)


def test_without_a_mask_causality_is_the_calls_or_else_the_layers() -> None:
    query, key, value = states(5, 5)
    causal = fused_attention(CAUSAL, query, key, value, None)[0]
    full = fused_attention(BIDIRECTIONAL, query, key, value, None)[0]
    assert not torch.allclose(causal, full)
    torch.testing.assert_close(fused_attention(CAUSAL, query, key, value, None, is_causal=False)[0], full)
    torch.testing.assert_close(fused_attention(BIDIRECTIONAL, query, key, value, None, is_causal=True)[0], causal)
    torch.testing.assert_close(fused_attention(Layer(), query, key, value, None)[0], causal)
    # The empty slots of a static cache come after the queries.
    _, longer_key, longer_value = states(5, 9)
    longer_key[:, :, :5], longer_value[:, :, :5] = key, value
    torch.testing.assert_close(fused_attention(CAUSAL, query, longer_key, longer_value, None)[0], causal)


def test_dropout_is_that_of_the_weights_returned() -> None:
    query, key, value = states(5, 9)
    out, weights = fused_attention(BIDIRECTIONAL, query, key, value, None, dropout=0.5, output_attentions=True)
    assert weights is not None
    assert (weights == 0).any()
    assert not torch.equal(out, fused_attention(BIDIRECTIONAL, query, key, value, None, dropout=0.5)[0])
    again = fused_attention(BIDIRECTIONAL, query, key, value, None, dropout=0.5, output_attentions=True)[1]
    assert not torch.equal(weights, again)  # type: ignore[arg-type]
    torch.testing.assert_close(out, (weights @ value.repeat_interleave(2, dim=1)).transpose(1, 2))


@pytest.mark.parametrize("name", ["indices", "head_mask", "cache", "sinks", "something_new"])
def test_an_unknown_argument_is_named(name: str) -> None:
    query, key, value = states(5, 5)
    unknown: dict[str, Any] = {name: torch.ones(4)}
    with pytest.raises(ValueError, match=f"^{name}: .* passes what this attention does not support"):
        fused_attention(CAUSAL, query, key, value, None, **unknown)
    fused_attention(CAUSAL, query, key, value, None, **dict.fromkeys(unknown))  # type: ignore[arg-type]
    fused_attention(CAUSAL, query, key, value, None, use_cache=True, position_ids=torch.arange(5), sliding_window=2)


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(BATCH, 5, dtype=torch.bool),
        torch.ones(BATCH, 1, 5, 5, dtype=torch.long),
        torch.ones(BATCH, 1, 5, 5, dtype=torch.uint8),
        torch.ones(BATCH, 4, 1, 5, dtype=torch.uint8),
        torch.ones(BATCH, 2, 5, 5, dtype=torch.int8),
    ],
    ids=lambda mask: f"{mask.dtype}-{tuple(mask.shape)}",
)
def test_a_mask_of_another_kind_is_refused(mask: Tensor) -> None:
    with pytest.raises(ValueError, match=r"attention_mask: got \w+ of shape \(3, .*\), expected 4-D bool or floating"):
        fused_attention(CAUSAL, *states(5, 5), mask)

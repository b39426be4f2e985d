"""Positional encodings and the embedding: the paper's equations, at any positions, cached, compiled, exported."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fusedformer import functional, nn
from fusedformer.transformer.embedding import TokenEmbedding
from fusedformer.transformer.positional_encoding import LearnedPositionalEncoding
from tests.tolerances import assert_equal_bits, assert_no_mistake, assert_within_contract

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def equation(position: int, d_model: int) -> list[float]:
    """The paper's, number for number."""
    wave = [math.sin, math.cos]
    return [wave[i % 2](position / 10000 ** ((i - i % 2) / d_model)) for i in range(d_model)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d_model", [1, 7, 64])
def test_it_is_the_papers_equation_rounded_once(d_model: int, dtype: torch.dtype) -> None:
    encoding = nn.SinusoidalPositionalEncoding(d_model, dropout=0.0)
    found = encoding(torch.zeros(130, d_model, dtype=dtype))
    truth = torch.tensor([equation(i, d_model) for i in range(130)], dtype=torch.float64)
    if dtype == torch.float64:
        assert_no_mistake(found, truth)
    else:
        assert_equal_bits(found, truth.to(dtype))


def test_far_positions_are_as_exact() -> None:
    encoding = nn.SinusoidalPositionalEncoding(16, dropout=0.0)
    found = encoding(torch.zeros(2, 16), 1_000_000)
    truth = torch.tensor([equation(1_000_000 + i, 16) for i in range(2)], dtype=torch.float64)
    assert_within_contract(found, truth, truth.float())


@pytest.mark.parametrize("kind", ["sinusoidal", "learned"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_offsets_of_every_kind_agree(kind: str, batch_first: bool) -> None:
    size = (40, 8, 0.0, batch_first)
    encoding = nn.SinusoidalPositionalEncoding(*size[1:]) if kind == "sinusoidal" else LearnedPositionalEncoding(*size)
    x = torch.randn(3, 30, 8)
    whole = x + encoding(torch.zeros(30, 8))
    laid = (lambda y: y) if batch_first else (lambda y: y.transpose(0, 1))
    assert_equal_bits(laid(encoding(laid(x))), whole)
    starts = torch.tensor([0, 7, 25])
    rows = torch.stack([x[i, start : start + 4] for i, start in enumerate(starts)])
    expected = torch.stack([whole[i, start : start + 4] for i, start in enumerate(starts)])
    assert_equal_bits(laid(encoding(laid(x[:, 11:15]), 11)), whole[:, 11:15])
    torch.testing.assert_close(laid(encoding(laid(rows), starts)), expected)
    torch.testing.assert_close(laid(encoding(laid(rows), starts[:, None] + torch.arange(4))), expected)
    torch.testing.assert_close(encoding(x[0, 5:9], torch.tensor(5)), whole[0, 5:9])


def test_nothing_is_saved_and_the_table_is_reused() -> None:
    encoding = nn.SinusoidalPositionalEncoding(8, 0.0, batch_first=True)
    first = encoding.span(0, 30, torch.float32, torch.device("cpu"))
    assert encoding.span(2, 20, torch.float32, torch.device("cpu")).data_ptr() == first[2].data_ptr()
    assert len(encoding.state_dict()) == len(list(encoding.parameters())) == 0
    for other in (copy.deepcopy(encoding), pickle.loads(pickle.dumps(encoding))):
        assert_equal_bits(other(torch.zeros(1, 30, 8))[0], first)


def test_a_table_made_in_another_mode_does_no_harm() -> None:
    encoding = nn.SinusoidalPositionalEncoding(8, 0.0)
    with FakeTensorMode():
        assert encoding(torch.zeros(5, 8)).shape == (5, 8)
    with torch.inference_mode():
        encoding(torch.zeros(5, 8))
    x = torch.randn(5, 8, requires_grad=True)
    (encoding.span(0, 5, x.dtype, x.device) * x).sum().backward()
    assert x.grad is not None
    assert_equal_bits(x.grad, encoding(torch.zeros(5, 8)))


def test_dropout_is_of_the_sum_and_in_training_alone() -> None:
    encoding = nn.SinusoidalPositionalEncoding(64, 0.5, batch_first=True)
    x = torch.randn(4, 50, 64)
    out = encoding(x)
    kept = out != 0
    assert 0.45 < kept.float().mean() < 0.55
    assert_equal_bits(out[kept], 2 * encoding.eval()(x)[kept])


def test_it_compiles_whole_and_exports_with_any_length() -> None:
    encoding = nn.SinusoidalPositionalEncoding(8, 0.0, batch_first=True)
    expected = encoding(torch.zeros(2, 100, 8))
    compiled: Any = torch.compile(encoding, fullgraph=True, backend="aot_eager", dynamic=True)
    length = torch.export.Dim("length", min=2)
    exported = torch.export.export(encoding, (torch.zeros(2, 9, 8),), dynamic_shapes=({1: length},)).module()
    for run in (compiled, exported):
        for size in (9, 100):
            torch.testing.assert_close(run(torch.zeros(2, size, 8)), expected[:, :size])


def test_a_learned_table_gets_its_gradient_and_ends() -> None:
    encoding = LearnedPositionalEncoding(6, 4, 0.0, batch_first=True)
    encoding(torch.zeros(3, 5, 4), 1).sum().backward()
    assert encoding.weight.grad is not None
    assert encoding.weight.grad[:, 0].tolist() == [0, 3, 3, 3, 3, 3]
    with pytest.raises(ValueError, match=r"x: got positions 3 to 7, expected 0 to 5"):
        encoding(torch.zeros(1, 5, 4), 3)


@pytest.mark.parametrize(
    ("x", "offset", "error", "message"),
    [
        (torch.zeros(3, 5, 7), 0, ValueError, r"x: got shape \(3, 5, 7\), expected 3 dimensions"),
        (torch.zeros(3, 5, 8, dtype=torch.int64), 0, TypeError, "x: got int64"),
        (torch.zeros(3, 5, 8), -1, ValueError, "offset: got -1, expected at least 0"),
        (torch.zeros(3, 5, 8), torch.zeros(3), TypeError, "offset: got float32, expected int64"),
        (
            torch.zeros(3, 5, 8),
            torch.zeros(4, dtype=torch.int64),
            ValueError,
            r"offset: got shape \(4,\), expected \(3,\)",
        ),
    ],
)
def test_wrong_input_is_named(x: Tensor, offset: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        nn.SinusoidalPositionalEncoding(8, batch_first=True)(x, offset)


def test_wrong_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="d_model: got 0"):
        nn.SinusoidalPositionalEncoding(0)
    with pytest.raises(ValueError, match="dropout: got 2"):
        nn.SinusoidalPositionalEncoding(4, 2.0)
    with pytest.raises(ValueError, match="max_length: got 0"):
        LearnedPositionalEncoding(0, 4)


def test_one_matrix_embeds_and_makes_logits() -> None:
    embedding = TokenEmbedding(11, 16, padding_idx=0)
    tokens, bias = torch.tensor([[3, 0, 5]]), torch.randn(11)
    out = embedding(tokens)
    assert_equal_bits(out, embedding.weight[tokens] * 4.0)
    assert out[0, 1].abs().max() == 0
    assert_equal_bits(embedding.logits(out, bias), functional.linear(out, embedding.weight, bias))
    embedding.logits(out.detach()).sum().backward()
    assert embedding.weight.grad is not None
    assert embedding.weight.grad[0].abs().max() > 0
    plain = TokenEmbedding(11, 16, scale=False)
    assert_equal_bits(plain(tokens), plain.weight[tokens])
    assert TokenEmbedding(400, 256).weight.std().sub(1 / 16).abs() < 0.005

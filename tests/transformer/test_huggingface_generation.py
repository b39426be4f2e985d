"""``generate`` against Hugging Face's, for a GPT-2, a Qwen3 with windows and a BART, small and with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedformer.transformer.models import CausalLanguageModel, Seq2SeqTransformer
from fusedformer.transformer.next_token import Sampling
from tests.tolerances import assert_equal_bits

transformers = pytest.importorskip("transformers")

VOCABULARY, NEW = 41, 11
TOKENS: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 1, "bos_token_id": 3, "eos_token_id": 2}
EOS = [2, 5, 9, 17]
Pair = tuple[Any, CausalLanguageModel | Seq2SeqTransformer]


def shared(stock: Any, cls: Any) -> Pair:
    """Both with weights so far apart that what is computed in another order decides nothing."""
    for x in stock.parameters():
        if x.dim() > 1:
            torch.nn.init.normal_(x, std=0.35)
    return stock.eval(), cls.from_huggingface(stock)


def gpt2() -> Pair:
    config = transformers.GPT2Config(**TOKENS, n_embd=32, n_head=4, n_layer=2, n_positions=32)
    return shared(transformers.GPT2LMHeadModel(config), CausalLanguageModel)


def qwen3() -> Pair:
    sizes: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10}
    windows: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}
    config = transformers.Qwen3Config(**TOKENS, **sizes, **windows, num_hidden_layers=2, intermediate_size=48)
    return shared(transformers.Qwen3ForCausalLM(config), CausalLanguageModel)


def bart() -> Pair:
    sides = {
        f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 2), ("attention_heads", 4))
    }
    sizes: dict[str, Any] = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 32}
    config = transformers.BartConfig(**TOKENS, **sides, **sizes, decoder_start_token_id=3, forced_eos_token_id=None)
    return shared(transformers.BartForConditionalGeneration(config), Seq2SeqTransformer)


PAIRS: dict[str, Callable[[], Pair]] = {"GPT-2": gpt2, "Qwen3": qwen3, "BART": bart}


@pytest.fixture(params=PAIRS)
def pair(request: pytest.FixtureRequest) -> Pair:
    """The same in every run: two continuations could be as good as equally likely."""
    torch.manual_seed(5)
    return PAIRS[request.param]()


def inputs() -> dict[str, Any]:
    """Padded on the left, as Hugging Face wants prompts."""
    mask = torch.ones(3, 6, dtype=torch.int64)
    mask[0, :4], mask[2, :1] = 0, 0
    return {"input_ids": torch.randint(18, VOCABULARY, (3, 6)).masked_fill(mask == 0, 1), "attention_mask": mask}


def assert_same(pair: Pair, theirs: dict[str, Any] | None = None, without_mask: bool = False, **options: Any) -> Tensor:
    stock, ours = pair
    given, draw = inputs(), int(torch.randint(1 << 30, ()))
    if without_mask:
        del given["attention_mask"]
    options = {"max_new_tokens": NEW, **options}
    torch.manual_seed(draw)
    expected = stock.generate(**given, **options | (theirs or {}))
    torch.manual_seed(draw)
    actual = ours.generate(**given, **options)
    assert torch.equal(actual, expected), options
    return actual


def test_greedy(pair: Pair) -> None:
    assert_same(pair)
    ended = assert_same(pair, eos_token_id=EOS)
    assert (ended == 1).any()
    assert_same(pair, eos_token_id=EOS, min_new_tokens=7)
    assert_same(pair, eos_token_id=EOS, pad_token_id=0)
    assert_same(pair, max_new_tokens=1)
    assert_same(pair, without_mask=True)
    assert_same(pair, without_mask=True, eos_token_id=[2, 1])


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_beam_search(pair: Pair, early_stopping: bool | str) -> None:
    options: dict[str, Any] = {"num_beams": 4, "early_stopping": early_stopping}
    assert_same(pair, **options)
    returned = [
        assert_same(pair, **options, eos_token_id=EOS, num_return_sequences=4, length_penalty=penalty, min_new_tokens=2)
        for penalty in (-1.0, 0.0, 0.6, 2.0)
    ]
    assert any((tokens[:, -1] == 1).any() for tokens in returned)


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, None, None), (0.7, 5, None), (1.6, 30, 0.8)])
def test_sampling(pair: Pair, temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Even the draws are the same: both take the largest of the probabilities over the same exponential noise."""
    options: dict[str, Any] = {"temperature": temperature, "do_sample": True, "eos_token_id": EOS}
    for copies in (1, 3):
        theirs = {"top_k": top_k or 0, "top_p": top_p or 1.0}
        assert_same(pair, theirs, **options, top_k=top_k, top_p=top_p, num_return_sequences=copies)


@pytest.mark.parametrize("ties", [False, True])
def test_filters(ties: bool) -> None:
    scores = torch.randn(50, 37) * 3
    scores = scores.round() if ties else scores
    for temperature, top_k, top_p in ((0.7, 5, 0.9), (1.3, 100, 0.3), (1.0, 1, 0.5), (2.0, 36, 0.99)):
        filters = [
            transformers.TemperatureLogitsWarper(temperature),
            transformers.TopKLogitsWarper(top_k),
            transformers.TopPLogitsWarper(top_p),
        ]
        expected = scores
        for one in filters:
            expected = one(None, expected)
        actual = Sampling(temperature, top_k, top_p).filtered(scores)
        assert_equal_bits(actual.softmax(-1), expected.softmax(-1))

"""The paper's model: its sizes, torch.nn.Transformer's numbers, and decoding as the whole forward."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedformer import nn
from fusedformer.transformer.models import Seq2SeqConfig, Seq2SeqTransformer
from fusedformer.transformer.models.seq2seq import shift_right
from tests.tolerances import assert_equal_bits, assert_no_mistake, assert_within_contract
from tests.transformer.reordering import Reordering

VOCABULARY = 29
SMALL = {"d_model": 24, "nhead": 3, "num_encoder_layers": 2, "num_decoder_layers": 2, "dim_feedforward": 40}
# As in Marian and torch.nn.Transformer, in modern models, and in BART.
KINDS: dict[str, dict[str, Any]] = {
    "paper": {},
    "pre-norm": {"norm_first": True, "final_norm": True, "activation": "gelu", "tie_embeddings": False},
    "bart": {"positions": "learned", "max_length": 16, "embedding_norm": True, "output_bias": True},
}
kinds = pytest.mark.parametrize("kind", KINDS)


def small(**options: Any) -> Seq2SeqTransformer:
    return Seq2SeqTransformer(Seq2SeqConfig(VOCABULARY, **{**SMALL, **options})).eval()


def drawn(batch: int = 3, source: int = 9, target: int = 7) -> dict[str, Tensor]:
    """Sources padded at their ends and at one's front, targets at their ends."""
    mask, target_mask = torch.ones(batch, source, dtype=torch.bool), torch.ones(batch, target, dtype=torch.bool)
    mask[0, 5:], mask[1, :2], target_mask[2, 4:] = False, False, False
    return {
        "input_ids": torch.randint(3, VOCABULARY, (batch, source)),
        "decoder_input_ids": torch.randint(3, VOCABULARY, (batch, target)),
        "attention_mask": mask,
        "decoder_attention_mask": target_mask,
    }


@pytest.mark.parametrize(
    ("size", "count", "papers"), [("base", 63_082_496, 65e6), ("big", 214_245_376, 213e6)], ids=["base", "big"]
)
def test_papers_models_have_the_papers_size(size: str, count: int, papers: float) -> None:
    with torch.device("meta"):
        model = Seq2SeqTransformer(getattr(Seq2SeqConfig, size)(37_000))
    found = sum(x.numel() for x in model.parameters())
    assert found == count
    assert found == pytest.approx(papers, rel=0.03)


class Stock(torch.nn.Module):
    """The same model put together from torch.nn, with the weights of ours."""

    encoding: Tensor

    def __init__(self, ours: Seq2SeqTransformer) -> None:
        super().__init__()
        c = ours.config
        sizes = (c.d_model, c.nhead, c.num_encoder_layers, c.num_decoder_layers, c.dim_feedforward, 0.0, c.activation)
        self.transformer = torch.nn.Transformer(*sizes, batch_first=True, norm_first=c.norm_first)
        if not c.final_norm:
            self.transformer.encoder.norm = self.transformer.decoder.norm = None
        self.embedding, self.output = (
            torch.nn.Embedding(VOCABULARY, c.d_model, 0),
            torch.nn.Linear(c.d_model, VOCABULARY, False),
        )
        self.transformer.load_state_dict(
            {name: x for name, x in ours.state_dict().items() if name.startswith(("encoder.", "decoder."))}
        )
        self.embedding.load_state_dict(ours.embedding.state_dict())
        self.output.load_state_dict(ours.output.state_dict())
        if c.tie_embeddings:
            self.output.weight = self.embedding.weight
        # Section 3.5.
        angles = torch.arange(9)[:, None].double() / 10000 ** (torch.arange(0, c.d_model, 2).double() / c.d_model)
        encoding = torch.stack([angles.sin(), angles.cos()], 2).flatten(1)
        self.register_buffer("encoding", encoding)

    def forward(
        self, input_ids: Tensor, decoder_input_ids: Tensor, attention_mask: Tensor, decoder_attention_mask: Tensor
    ) -> Tensor:
        causal = torch.nn.Transformer.generate_square_subsequent_mask(decoder_input_ids.size(1), dtype=torch.bool)
        out = self.transformer(
            self._embed(input_ids),
            self._embed(decoder_input_ids),
            tgt_mask=causal,
            src_key_padding_mask=~attention_mask,
            tgt_key_padding_mask=~decoder_attention_mask,
            memory_key_padding_mask=~attention_mask,
        )
        return self.output(out)  # type: ignore[no-any-return]

    def _embed(self, ids: Tensor) -> Tensor:
        x: Tensor = self.embedding(ids)
        return x * math.sqrt(x.size(2)) + self.encoding[: x.size(1)].to(x.dtype)


@pytest.mark.parametrize("kind", ["paper", "pre-norm"])
def test_logits_and_gradients_are_torchs(kind: str, seed: int) -> None:
    ours = small(**KINDS[kind])
    inputs = drawn()
    grad_out = torch.randn(3, 7, VOCABULARY)

    def run(model: torch.nn.Module, dtype: torch.dtype, order: Tensor) -> list[Tensor]:
        logits = model.to(dtype)(**{name: x[order] for name, x in inputs.items()})
        grads = torch.autograd.grad(logits, list(model.parameters()), grad_out[order].to(dtype))
        return [logits.detach()[order.argsort()], *grads]

    def reordered() -> list[Tensor]:
        """The same sums in another order."""
        model, features = Stock(ours), Reordering(*(SMALL[name] for name in ("d_model", "nhead", "dim_feedforward")))
        features.model(model)
        return [features.undone(x) for x in run(model, torch.float32, torch.randperm(3))]

    stock = Stock(ours)
    names = [name.removeprefix("transformer.") for name, _ in stock.named_parameters()]
    eager = [reordered() for _ in range(6)]
    truth = run(stock, torch.float64, torch.arange(3))
    parameters = dict(ours.named_parameters())
    assert set(parameters) == set(names)
    logits = ours(**inputs)
    found = [logits.detach(), *torch.autograd.grad(logits, [parameters[name] for name in names], grad_out)]
    for name, x, expected, *attempts in zip(["logits", *names], found, truth, *eager, strict=True):
        for attempt in attempts:
            assert_no_mistake(attempt, expected, f"reordered {name}")
        assert_within_contract(x, expected, attempts, name)


@pytest.mark.parametrize("page", [None, 4], ids=["whole", "paged"])
@kinds
def test_decoding_gives_the_whole_forwards_logits(kind: str, page: int | None, seed: int) -> None:
    model = small(**KINDS[kind])
    inputs = drawn()
    inputs["decoder_attention_mask"][:] = True
    tokens = inputs["decoder_input_ids"]
    with torch.no_grad():
        eager, truth = model(**inputs), model.double()(**inputs)
        model.float()
        cache = model.start(inputs["input_ids"], inputs["attention_mask"], 7, page=page)
        # Prompts of 2, 1 and 3 tokens, then one of each row at a time.
        counts = torch.tensor([2, 1, 3])
        logits = model.decode(tokens[:, :3], cache, counts)
        for step in range(4):
            at = (torch.arange(3), counts + step - 1)
            assert_within_contract(logits, truth[at], eager[at], f"step {step}")
            logits = model.decode(tokens[torch.arange(3), counts + step][:, None], cache)
    assert cache.lengths.tolist() == [6, 5, 7]


def test_what_is_masked_changes_nothing(seed: int) -> None:
    model = small()
    inputs = drawn()
    masks = inputs["attention_mask"], inputs["decoder_attention_mask"]
    others = {**inputs, **{name: x.int() for name, x in inputs.items() if "mask" in name}}
    for name, mask in zip(("input_ids", "decoder_input_ids"), masks, strict=True):
        others[name] = inputs[name].where(mask, torch.randint(VOCABULARY, mask.shape))
    with torch.no_grad():
        assert_equal_bits(model(**others)[masks[1]], model(**inputs)[masks[1]])
        later = inputs["decoder_input_ids"].index_fill(1, torch.tensor([5, 6]), 4)
        assert_equal_bits(model(**{**inputs, "decoder_input_ids": later})[:, :5], model(**inputs)[:, :5])


@kinds
def test_a_saved_model_is_read_again(kind: str, tmp_path: Path, seed: int) -> None:
    pytest.importorskip("safetensors")
    model, inputs = small(**KINDS[kind]), drawn()
    model.save_pretrained(tmp_path)
    read = Seq2SeqTransformer.from_pretrained(tmp_path)
    assert read.config == model.config
    assert (read.output.weight is read.embedding.weight) == model.config.tie_embeddings
    with torch.no_grad():
        assert_equal_bits(read(**inputs), model(**inputs))


@pytest.mark.parametrize("place", ["dropout", "attention_dropout", "activation_dropout"])
@pytest.mark.parametrize("kind", ["paper", "bart"])
def test_each_dropout_acts_where_it_is_asked_for(place: str, kind: str, seed: int) -> None:
    options = {**KINDS[kind], "dropout": 0.0}
    model, inputs = small(**{**options, place: 0.5}), drawn()
    plain = small(**options)
    plain.load_state_dict(model.state_dict())
    expected = model(**inputs)
    assert not torch.equal(model.train()(**inputs), expected)
    assert_equal_bits(plain.train()(**inputs), expected)
    assert {module.dropout for module in model.modules() if isinstance(module, nn.MultiheadAttention)} == {
        0.5 if place == "attention_dropout" else 0.0
    }


def test_weights_start_as_documented(seed: int) -> None:
    model = small(positions="learned", max_length=400, d_model=48, pad_token_id=5)
    assert not model.embedding.weight[5].any()
    names = ("embedding.weight", "encoder_input.positions.weight", "decoder_input.positions.weight")
    tables = [model.get_parameter(name) for name in names]
    for table in tables:
        assert table.std().item() == pytest.approx(48**-0.5, rel=0.2)
    for name, x in model.named_parameters():
        if name.endswith("bias"):
            assert not x.any(), name
        elif "norm" in name:
            assert (x == 1).all(), name
        elif x.dim() == 2 and not any(x is table for table in tables):
            bound = (6 / sum(x.shape)) ** 0.5
            assert 0.9 * bound < x.abs().max() <= bound, name


def test_the_whole_model_compiles_in_one_graph(seed: int) -> None:
    model, inputs = small(num_encoder_layers=1, num_decoder_layers=1), drawn()
    with torch.no_grad():
        expected = model(**inputs)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert_equal_bits(compiled(**inputs), expected)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"vocab_size": 0}, ValueError, "vocab_size: got 0, expected at least 1"),
        ({"d_model": 24.0}, TypeError, "d_model: got float, expected an int"),
        ({"nhead": 5}, ValueError, "nhead: got 5, expected a divisor of d_model = 24"),
        ({"dropout": 1.5}, ValueError, "dropout: got 1.5"),
        ({"activation": "tanh"}, ValueError, "activation: got 'tanh'"),
        ({"positions": "rotary"}, ValueError, "positions: got 'rotary'"),
        ({"positions": "learned"}, TypeError, "max_length: got NoneType, expected an int"),
        ({"max_length": 9}, ValueError, "max_length: got 9, expected None"),
        ({"eos_token_id": VOCABULARY}, ValueError, "eos_token_id: got 29"),
        ({"decoder_start_token_id": None}, TypeError, "decoder_start_token_id: got NoneType"),
    ],
    ids=str,
)
def test_a_wrong_config_is_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Seq2SeqConfig(**{"vocab_size": VOCABULARY, **SMALL, **options})


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("input_ids", Tensor.int, TypeError, "input_ids: got int32, expected int64"),
        ("input_ids", lambda x: x[0], ValueError, r"input_ids: got shape \(9,\)"),
        (
            "decoder_input_ids",
            lambda x: x[:2],
            ValueError,
            r"decoder_input_ids: got a batch of 2, expected 3",
        ),
        ("attention_mask", lambda x: x[:, 1:], ValueError, r"attention_mask: got shape \(3, 8\), expected \(3, 9\)"),
        ("decoder_attention_mask", Tensor.float, TypeError, "decoder_attention_mask: got float32"),
    ],
)
def test_a_wrong_argument_is_named(
    name: str, change: Callable[[Tensor], Tensor], error: type[Exception], message: str
) -> None:
    inputs = drawn()
    with pytest.raises(error, match=message):
        small()(**{**inputs, name: change(inputs[name])})


def test_labels_shift_right() -> None:
    labels = torch.tensor([[5, 6, 7, 2], [8, 2, -100, -100]])
    assert shift_right(labels, 1, 0).tolist() == [[1, 5, 6, 7], [1, 8, 2, 0]]

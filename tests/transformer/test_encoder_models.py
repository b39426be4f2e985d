"""Encoder models of our own: variants against torch.nn, padding, predicting some positions, training, saving."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedformer.kernels.common.activations import ACTIVATIONS, check_activation
from fusedformer.transformer.loss import cross_entropy
from fusedformer.transformer.models import (
    ClassifierConfig,
    Encoder,
    EncoderConfig,
    MaskedLanguageModel,
    PretrainedModel,
    SequenceClassifier,
    SequenceClassifierConfig,
    TokenClassifier,
    mask_tokens,
)
from tests.tolerances import assert_equal_bits, assert_within_contract

CONFIG = EncoderConfig(23, d_model=32, nhead=4, num_layers=2, dim_feedforward=48, max_length=20, initializer_range=0.2)
VARIANTS: dict[str, dict[str, Any]] = {
    "BERT": {},
    "pre-norm": {"norm_first": True, "activation": "relu"},
    "sinusoidal": {"positions": "sinusoidal", "max_length": None, "scale_embedding": True, "token_types": 0},
    "RoBERTa": {"skip_padding": True, "pad_token_id": 1},
    "no embedding norm": {"embedding_norm": False, "layer_norm_eps": 1e-5, "pad_token_id": None},
}
SEQUENCES = SequenceClassifierConfig(**vars(replace(CONFIG)), num_labels=3)
MODELS: list[tuple[type[PretrainedModel], EncoderConfig]] = [
    (Encoder, CONFIG),
    (MaskedLanguageModel, CONFIG),
    (SequenceClassifier, SEQUENCES),
    (SequenceClassifier, replace(SEQUENCES, pooling="mean", pooler=None)),
    (TokenClassifier, ClassifierConfig(**vars(CONFIG), num_labels=3)),
]
IDS = [f"{model.__name__}-{getattr(config, 'pooling', '')}" for model, config in MODELS]


def batch(pad: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens and the mask of those that take part."""
    real = torch.arange(11) < 11 - 5 * torch.arange(3)[:, None]
    return torch.randint(3, 23, (3, 11)).where(real, pad), real


class Stock(torch.nn.Module):
    """The same encoder of torch.nn's parts, with the weights of ours."""

    def __init__(self, ours: Encoder) -> None:
        super().__init__()
        c = self.config = ours.config
        layer = torch.nn.TransformerEncoderLayer(
            c.d_model, c.nhead, c.dim_feedforward, 0.0, c.activation, c.layer_norm_eps, True, c.norm_first
        )
        final = torch.nn.LayerNorm(c.d_model, c.layer_norm_eps) if c.norm_first else None
        self.transformer = torch.nn.TransformerEncoder(layer, c.num_layers, final, enable_nested_tensor=False)
        self.transformer.load_state_dict(ours.transformer.state_dict())
        self.embeddings = copy.deepcopy(ours.embeddings)

    def forward(self, tokens: Tensor, real: Tensor, types: Tensor | None) -> Tensor:
        c = self.config
        parts: Any = self.embeddings
        x = parts.words.weight[tokens] * (math.sqrt(c.d_model) if c.scale_embedding else 1.0)
        if parts.token_types is not None:
            x = x + parts.token_types.weight[torch.zeros_like(tokens) if types is None else types]
        positions = torch.arange(tokens.size(1)).expand_as(tokens)
        if c.skip_padding:
            assert c.pad_token_id is not None
            positions = (positions + c.pad_token_id + 1).where(real, c.pad_token_id)
        if c.positions == "learned":
            x = x + parts.positions.weight[positions]
        else:
            waves = 10000.0 ** (torch.arange(c.d_model) // 2 * 2 / c.d_model).double()
            angles = positions[..., None] / waves
            x = x + torch.where(torch.arange(c.d_model) % 2 == 0, angles.sin(), angles.cos()).to(x.dtype)
        if parts.norm is not None:
            x = parts.norm(x)
        out: Tensor = self.transformer(x, src_key_padding_mask=~real)
        return out


def gradients(model: torch.nn.Module, names: list[str]) -> Tensor:
    """Of the parameters of these names, in one vector."""
    parameters = dict(model.named_parameters())
    grads = [parameters[name].grad for name in names]
    parts = [torch.zeros_like(parameters[n]) if x is None else x for n, x in zip(names, grads, strict=True)]
    return torch.cat([part.flatten() for part in parts])


@pytest.mark.parametrize("has_types", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_its_equation(variant: str, has_types: bool, seed: int) -> None:
    config = replace(CONFIG, **VARIANTS[variant])
    ours = Encoder(config).eval()
    eager = Stock(ours).train()  # as training has no other path; there is no dropout
    truth = copy.deepcopy(eager).double()
    tokens, real = batch(config.pad_token_id or 0)
    types = torch.randint(2, tokens.shape) if has_types and config.token_types else None
    found, expected, stock = (
        ours(tokens, real, types)[real],
        truth(tokens, real, types)[real],
        eager(tokens, real, types)[real],
    )
    assert_within_contract(found.detach(), expected.detach(), stock.detach())
    direction = torch.randn_like(found)
    for result in (found, expected, stock):
        (result * direction.to(result.dtype)).sum().backward()
    names = [name for name, _ in ours.named_parameters()]
    assert_within_contract(gradients(ours, names), gradients(truth, names), gradients(eager, names), "gradients")


@pytest.mark.parametrize(("model_class", "config"), MODELS, ids=IDS)
def test_padding_changes_nothing(model_class: type[PretrainedModel], config: EncoderConfig) -> None:
    model = model_class(config).eval()
    tokens, real = batch()
    found = model(tokens, real)
    other = model(torch.where(real, tokens, 7), real.long())
    alone = torch.cat([model(row[keep][None]).flatten(0, -2) for row, keep in zip(tokens, real, strict=True)])
    if found.dim() == 3:
        found, other = found[real], other[real]
    assert_equal_bits(other, found)
    torch.testing.assert_close(alone, found)


@pytest.mark.parametrize(("model_class", "config"), MODELS, ids=IDS)
def test_what_is_saved_is_loaded(model_class: type[PretrainedModel], config: EncoderConfig, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    model = model_class(config).eval()
    model.save_pretrained(tmp_path)
    loaded = model_class.from_pretrained(tmp_path)
    assert loaded.config == config
    tokens, real = batch()
    assert_equal_bits(loaded(tokens, real), model(tokens, real))
    encoder = Encoder.from_pretrained(tmp_path)  # of any of them, the head left out
    assert encoder.config == CONFIG
    assert_equal_bits(encoder(tokens, real), getattr(model, "encoder", model)(tokens, real))


def test_predicting_some_positions_gives_their_logits() -> None:
    model = MaskedLanguageModel(CONFIG).eval()
    tokens, real = batch()
    whole = model(tokens, real)
    chosen = torch.rand(tokens.shape) < 0.3
    torch.testing.assert_close(model(tokens, real, predict=chosen), whole[chosen])
    places = torch.tensor([[0, 4], [7, 1], [3, 3]])
    torch.testing.assert_close(model(tokens, real, predict=places), whole[torch.arange(3)[:, None], places])
    assert model(tokens, predict=torch.zeros_like(real)).shape == (0, 23)


def test_weights_start_as_berts_and_are_tied() -> None:
    model = MaskedLanguageModel(replace(CONFIG, vocab_size=500, initializer_range=0.05))
    words = model.encoder.embeddings.words.weight
    assert model.head.output.weight is words
    assert words[0].abs().max() == 0
    for name, x in model.named_parameters():
        if x.dim() > 1 and x.numel() > 1000:
            assert abs(x.std() - 0.05) < 0.005, name
        elif x.dim() == 1:
            assert x.eq(1.0 if "norm" in name and name.endswith("weight") else 0.0).all(), name
    untied = MaskedLanguageModel(replace(CONFIG, tie_embeddings=False))
    assert untied.head.output.weight is not untied.encoder.embeddings.words.weight


def test_dropout_is_where_the_config_says() -> None:
    tokens, _ = batch()
    none: dict[str, Any] = {
        f"{kind}dropout": 0.0 for kind in ("", "attention_", "activation_", "classifier_", "pooler_")
    }
    for name in none:
        model = SequenceClassifier(replace(SEQUENCES, **{**none, name: 0.5}))
        assert not torch.equal(model(tokens), model(tokens)), name
        model = SequenceClassifier(replace(SEQUENCES, **none))
        assert_equal_bits(model(tokens), model(tokens))


def test_it_compiles_whole() -> None:
    model = MaskedLanguageModel(replace(CONFIG, num_layers=1)).eval()
    tokens, real = batch()
    places = torch.tensor([[0, 4], [7, 1], [3, 3]])
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(tokens, real, predict=places), model(tokens, real, predict=places))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"vocab_size": 0}, ValueError, "vocab_size: got 0, expected at least 1"),
        ({"d_model": 32.0}, TypeError, "d_model: got float, expected an int"),
        ({"nhead": 5}, ValueError, "nhead: got 5, expected a divisor of d_model = 32"),
        ({"activation": "quick_gelu"}, ValueError, "activation: got 'quick_gelu'"),
        ({"attention_dropout": 1.5}, ValueError, "attention_dropout: got 1.5"),
        ({"positions": "rotary"}, ValueError, "positions: got 'rotary'"),
        ({"max_length": None}, TypeError, "max_length: got NoneType"),
        ({"positions": "sinusoidal"}, ValueError, "max_length: got 20, expected None"),
        ({"token_types": -1}, ValueError, "token_types: got -1"),
        ({"pad_token_id": 23}, ValueError, r"pad_token_id: got 23, expected a token of \[0, 23\)"),
        ({"pad_token_id": None, "skip_padding": True}, ValueError, "pad_token_id: got None"),
        ({"pooling": "max"}, ValueError, "pooling: got 'max'"),
        ({"pooler": "gelu"}, ValueError, "pooler: got 'gelu'"),
        ({"label_names": ("a", "b")}, ValueError, "label_names: got 2, expected num_labels = 3"),
    ],
)
def test_wrong_configs_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        replace(SEQUENCES, **options)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input_ids": torch.zeros(2, 5)}, TypeError, "input_ids: got float32, expected int64"),
        ({"input_ids": torch.zeros(5).long()}, ValueError, r"input_ids: got shape \(5,\)"),
        ({"input_ids": torch.zeros(2, 21).long()}, ValueError, "got positions 0 to 20, expected 0 to 19"),
        ({"token_type_ids": torch.ones(2, 5) > 0}, TypeError, "token_type_ids: got bool, expected int64"),
        ({"attention_mask": torch.ones(2, 4)}, TypeError, "attention_mask: got float32"),
        (
            {"attention_mask": torch.ones(2, 4).long()},
            ValueError,
            r"attention_mask: got shape \(2, 4\), expected \(2, 5\)",
        ),
        ({"token_type_ids": torch.ones(2, 4).long()}, ValueError, r"token_type_ids: got shape \(2, 4\)"),
        ({"predict": torch.ones(2, 4) > 0}, ValueError, r"predict: got shape \(2, 4\), expected \(2, 5\)"),
        ({"predict": torch.ones(2, 4)}, TypeError, "predict: got float32"),
    ],
)
def test_wrong_input_is_named(arguments: dict[str, Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MaskedLanguageModel(CONFIG)(**{"input_ids": torch.zeros(2, 5).long(), **arguments})


def test_more_tokens_than_positions_behind_the_padding_are_refused() -> None:
    encoder = Encoder(replace(CONFIG, **VARIANTS["RoBERTa"]))
    encoder(torch.full((1, 18), 5))
    with pytest.raises(ValueError, match="input_ids: got 19 tokens, expected at most 18"):
        encoder(torch.full((1, 19), 5))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_copies_keep_an_activation_that_kernels_have(activation: str) -> None:
    model = MaskedLanguageModel(replace(CONFIG, activation=activation)).eval()
    tokens, real = batch()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert {check_activation(layer.activation) for layer in other.encoder.transformer.layers} == {activation}
        assert_equal_bits(other(tokens, real), model(tokens, real))


def test_token_types_that_the_config_lacks_are_refused() -> None:
    tokens, _ = batch()
    with pytest.raises(ValueError, match="token_type_ids: got a tensor, expected None"):
        Encoder(replace(CONFIG, token_types=0))(tokens, token_type_ids=torch.zeros_like(tokens))


def test_masking_is_berts() -> None:
    tokens = torch.randint(5, 1000, (400, 100))
    special = torch.rand(tokens.shape) < 0.2
    before = tokens.clone()
    masked, labels = mask_tokens(tokens, 3, 1000, 0.2, special.long(), torch.Generator().manual_seed(1))
    again, _ = mask_tokens(tokens, 3, 1000, 0.2, special, torch.Generator().manual_seed(1))
    assert_equal_bits(again, masked)
    assert_equal_bits(tokens, before)
    chosen = labels != -100
    assert not (chosen & special).any()
    assert_equal_bits(labels[chosen], tokens[chosen])
    assert_equal_bits(masked[~chosen], tokens[~chosen])
    hidden, same = chosen & (masked == 3), chosen & (masked == tokens)
    other = chosen & ~hidden & ~same
    count = chosen.sum()
    shares = [(part.sum() / of).item() for part, of in ((chosen, (~special).sum()), (hidden, count), (same, count))]
    assert shares == pytest.approx([0.2, 0.8, 0.1], abs=0.02)
    assert masked[other].float().mean().item() == pytest.approx(500, abs=50)
    assert not (mask_tokens(tokens, 3, 1000, 0.0)[1] != -100).any()
    with pytest.raises(ValueError, match="mask_token_id: got 1000"):
        mask_tokens(tokens, 1000, 1000)
    with pytest.raises(TypeError, match="input_ids: got float32"):
        mask_tokens(tokens.float(), 3, 1000)


def sentences(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens that count up or down in a circle of ten, padded; which take part; and up (1) or down (0)."""
    up = torch.randint(2, (count,), generator=generator)
    first = torch.randint(10, (count, 1), generator=generator)
    length = torch.randint(4, 9, (count, 1), generator=generator)
    tokens = 3 + (first + (2 * up[:, None] - 1) * torch.arange(8)) % 10
    real = torch.arange(8) < length
    return tokens.where(real, 0), real, up


def train(model: torch.nn.Module, steps: int, loss_of_batch: Callable[[], Tensor]) -> list[float]:
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=3e-3), []
    for _ in range(steps):
        loss = loss_of_batch()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_pretraining_learns_and_helps_fine_tuning(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(5)
    options: dict[str, Any] = {"dropout": 0.0, "attention_dropout": 0.0, "initializer_range": 0.05}
    model = MaskedLanguageModel(replace(CONFIG, **options))

    def masked_loss() -> Tensor:
        tokens, real, _ = sentences(32, generator)
        masked, labels = mask_tokens(tokens, 2, 13, 0.15, ~real, generator)
        chosen = labels != -100
        return cross_entropy(model(masked, real, predict=chosen), labels[chosen])

    losses = train(model, 200, masked_loss)
    assert sum(losses[-20:]) / 20 < 1.3 < math.log(10) < sum(losses[:10]) / 10  # a guess among the ten
    model.save_pretrained(tmp_path)

    def accuracy(is_pretrained: bool) -> float:
        classifier = SequenceClassifier(SequenceClassifierConfig(**vars(model.config), pooling="mean"))
        if is_pretrained:
            classifier.encoder = Encoder.from_pretrained(tmp_path).train()

        def loss_of_batch() -> Tensor:
            tokens, real, up = sentences(32, generator)
            return cross_entropy(classifier(tokens, real), up)

        train(classifier, 40, loss_of_batch)
        tokens, real, up = sentences(500, generator)
        with torch.no_grad():
            right: Tensor = classifier.eval()(tokens, real).argmax(1) == up
        return right.float().mean().item()

    assert accuracy(is_pretrained=True) > 0.95 > 0.75 > accuracy(is_pretrained=False)

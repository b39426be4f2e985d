"""The decoder-only model on its own: its config, its start, its padding, its dropout, and decoding like recomputing."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fusedformer.transformer.models import CausalConfig, CausalLanguageModel, causal
from tests.tolerances import assert_equal_bits, assert_no_mistake

VOCABULARY, BATCH, LENGTH = 37, 3, 9
SIZES: dict[str, Any] = {"d_model": 24, "nhead": 4, "num_layers": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
NO_DROPOUT: dict[str, Any] = {"dropout": 0.0, "embedding_dropout": 0.0, "attention_dropout": 0.0}
STYLES = {
    "GPT-2": CausalConfig(VOCABULARY, max_length=32, **SIZES, **NO_DROPOUT),
    "sinusoidal": CausalConfig(VOCABULARY, positions="sinusoidal", max_length=None, **SIZES, **NO_DROPOUT),
    "Llama": CausalConfig.llama(VOCABULARY, num_kv_heads=2, dim_feedforward=20, rope_scaling=LLAMA3, **SIZES),
    "Qwen3": CausalConfig.llama(VOCABULARY, head_dim=8, window=(3, None), query_key_norm=True, **SIZES),
    "one key head": CausalConfig.llama(VOCABULARY, num_kv_heads=1, head_dim=10, norm="layer_norm", **SIZES),
}

every_style = pytest.mark.parametrize("style", STYLES)


def build(style: str, dtype: torch.dtype = torch.float64, **others: Any) -> CausalLanguageModel:
    """With weights large enough that attention is not nearly uniform."""
    model = CausalLanguageModel(dataclasses.replace(STYLES[style], **others)).to(dtype)
    with torch.no_grad():
        for x in model.parameters():
            x.normal_(1.0 if x.dim() == 1 else 0.0, 0.2)
    return model.eval()


def tokens(length: int = LENGTH) -> Tensor:
    return torch.randint(0, VOCABULARY, (BATCH, length))


@every_style
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(style: str, side: str) -> None:
    model, ids = build(style), tokens()
    lengths = (LENGTH, 5, 1)
    mask = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, slice(LENGTH - length, None) if side == "left" else slice(length)] = 1
    logits = model(ids, mask)
    assert logits.isfinite().all()
    for row in range(BATCH):
        real = mask[row] != 0
        assert_no_mistake(logits[row, real], model(ids[row, real][None])[0])


@every_style
@pytest.mark.parametrize(("batch", "length"), [(0, LENGTH), (BATCH, 0)])
def test_nothing_gives_nothing(style: str, batch: int, length: int) -> None:
    model = build(style, torch.float32)
    mask = torch.ones(batch, length, dtype=torch.bool)
    for given in (None, mask):
        logits = model(torch.zeros(batch, length, dtype=torch.long), given)
        assert logits.shape == (batch, length, VOCABULARY)
        logits.sum().backward()


@every_style
@pytest.mark.parametrize("page", [None, 4])
def test_decoding_is_recomputing(style: str, page: int | None) -> None:
    model, ids = build(style), tokens(LENGTH + 6)
    counts = torch.tensor([LENGTH, 5, 1])
    texts = [ids[row, :count] for row, count in enumerate(counts)]
    model.train()  # decoding drops nothing, whatever the mode
    with torch.no_grad():
        cache = model.new_cache(BATCH, LENGTH + 6, page=page)
        logits = model.decode(ids[:, :LENGTH], cache, counts)
        for length in (1, 3, 1):  # tokens at a time
            for row, text in enumerate(texts):
                assert_no_mistake(logits[row], model(text[None])[0, -1], f"row {row}")
            new = tokens(length)
            texts = [torch.cat(pair) for pair in zip(texts, new, strict=True)]
            logits = model.decode(new, cache)
        assert cache.lengths.tolist() == [len(text) for text in texts]


def test_logits_are_computed_of_the_last_tokens_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("Llama")
    multiplied = []

    def apply_linear(x: Tensor, module: torch.nn.Linear) -> Tensor:
        multiplied.append(tuple(x.shape))
        return module(x)  # type: ignore[no-any-return]

    monkeypatch.setattr(causal, "apply_linear", apply_linear)
    with torch.no_grad():
        model.decode(tokens(), model.new_cache(BATCH, LENGTH))
    assert multiplied == [(BATCH, model.config.d_model)]


@every_style
def test_generates_what_recomputing_does(style: str) -> None:
    model, ids = build(style, torch.float32), tokens()
    expected = ids
    with torch.no_grad():
        for _ in range(7):
            expected = torch.cat([expected, model(expected)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(model.generate(ids, max_new_tokens=7), expected)


def test_weights_start_as_gpt2s() -> None:
    model = CausalLanguageModel(CausalConfig(300, d_model=96, nhead=4, num_layers=8, max_length=50))
    assert model.output.weight is model.embedding.weight
    seen = set()
    for name, x in model.named_parameters():
        if x.dim() == 1:
            assert_equal_bits(x.detach(), torch.full_like(x, 0.0 if name.endswith("bias") else 1.0), name)
            continue
        writes = "out_proj" in name or "linear2" in name
        seen.add(writes)
        expected = 0.02 / math.sqrt(2 * 8) if writes else 0.02
        error = 6 / math.sqrt(2 * x.numel())  # six standard deviations of what is estimated
        assert abs(x.std().item() / expected - 1) < error, name
        assert abs(x.mean().item()) < 6 * expected / math.sqrt(x.numel()), name
    assert seen == {True, False}


def test_dropout_has_gpt2s_places() -> None:
    """Each probability at 1, where the model says alone what was not dropped."""
    ids = tokens()
    for field in NO_DROPOUT:
        model: Any = build("GPT-2", **{field: 1.0})  # type: ignore[arg-type]
        expected = model(ids)
        model.train()
        dropped = model(ids)
        with torch.no_grad():
            for layer in model.layers:
                layer.in_proj.weight[2 * 24 :].zero_()  # nothing but biases comes out of attention
                layer.in_proj.bias[2 * 24 :].zero_()
            if field == "embedding_dropout":
                model.embedding.weight.zero_()
                model.positions.weight.zero_()
                model.output = torch.nn.Linear(24, VOCABULARY, False, dtype=torch.float64)
            elif field == "dropout":
                for layer in model.layers:
                    for last in (layer.out_proj, layer.feed_forward.linear2):
                        last.weight.zero_()
                        last.bias.zero_()
        model.eval()
        if field == "embedding_dropout":
            assert_no_mistake(dropped, dropped[:1, :1].expand_as(dropped))  # as all tokens are alike
        else:
            assert_no_mistake(dropped, model(ids))
        assert (expected - dropped).abs().max() > 0.1, field


@every_style
def test_dropout_is_drawn_and_keeps_the_mean(style: str) -> None:
    model = build(style, torch.float32, dropout=0.1, embedding_dropout=0.1, attention_dropout=0.1)
    ids = tokens()
    expected = model(ids).detach()
    model.train()
    with torch.no_grad():
        drawn = torch.stack([model(ids) for _ in range(100)])
    assert drawn.std(0).min() > 0.0
    # The model is not linear, so that its mean is only near: nearer than a draw is.
    assert (drawn.mean(0) - expected).square().mean() < (drawn - expected).square().mean() / 2


@every_style
def test_checkpointed_layers_have_the_same_gradients(style: str) -> None:
    model, ids = build(style, torch.float32, dropout=0.2, embedding_dropout=0.2, attention_dropout=0.2), tokens()
    model.train()
    results = []
    for checkpointed in (False, True):
        if checkpointed:
            for layer in model.layers:
                layer.forward = lambda *given, of=layer.forward: checkpoint(of, *given, use_reentrant=False)
        torch.manual_seed(7)
        model.zero_grad()
        model(ids).square().sum().backward()
        results.append({name: x.grad for name, x in model.named_parameters()})
    for name, expected in results[0].items():
        found = results[1][name]
        assert expected is not None
        assert found is not None
        assert_equal_bits(found, expected, name)


@pytest.mark.parametrize("style", ["Llama", "Qwen3"])
def test_compiles_whole_with_changing_lengths(style: str) -> None:
    model = build(style, torch.float32)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    for length in (LENGTH, LENGTH + 4):
        ids, mask = tokens(length), torch.arange(length) >= torch.tensor([[0], [2], [4]])
        with torch.no_grad():
            assert_no_mistake(compiled(ids, mask)[mask], model(ids, mask)[mask].double())


def test_is_exported_for_every_length() -> None:
    model = build("GPT-2", torch.float32)
    length = torch.export.Dim("length", min=2, max=32)
    given = tokens(), torch.ones(BATCH, LENGTH, dtype=torch.bool)
    exported = torch.export.export(model, given, dynamic_shapes=({1: length}, {1: length})).module()
    ids, mask = tokens(LENGTH + 4), torch.arange(LENGTH + 4) >= torch.tensor([[0], [2], [4]])
    with torch.no_grad():
        assert_no_mistake(exported(ids, mask)[mask], model(ids, mask)[mask].double())


@every_style
def test_saved_and_loaded(style: str, tmp_path: Path) -> None:
    model = build(style, torch.float32, eos_token_id=(3, 5))
    model.save_pretrained(tmp_path)
    loaded = CausalLanguageModel.from_pretrained(tmp_path)
    assert loaded.config == model.config
    ids = tokens()
    assert_equal_bits(loaded(ids).detach(), model(ids).detach())


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"d_model": 0}, ValueError, "d_model: got 0, expected at least 1"),
        ({"num_layers": 2.0}, TypeError, "num_layers: got float"),
        ({"nhead": 5}, ValueError, "nhead: got 5, expected a divisor of d_model = 24"),
        ({"num_kv_heads": 3}, ValueError, "num_kv_heads: got 3, expected a divisor of nhead = 4"),
        ({"activation": "tanh"}, ValueError, "activation"),
        ({"activation": torch.tanh}, TypeError, "activation: got .*, expected a name"),
        ({"norm": "batch_norm"}, ValueError, "norm: got 'batch_norm'"),
        ({"norm_eps": -1.0}, ValueError, "norm_eps: got -1.0"),
        ({"positions": "alibi"}, ValueError, "positions: got 'alibi'"),
        ({"max_length": None}, TypeError, "max_length: got NoneType"),
        ({"positions": "rotary"}, ValueError, "max_length: got 1024, expected None"),
        ({"positions": "rotary", "max_length": None, "head_dim": 9}, ValueError, "head_dim: got 9"),
        ({"rope_theta": 0.0}, ValueError, "rope_theta: got 0.0"),
        ({"rope_scaling": {"rope_type": "yarn"}}, ValueError, "rope_scaling: got .*yarn"),
        ({"window": 0}, ValueError, "window: got 0, expected at least 1"),
        ({"window": (3, None, 3)}, ValueError, "window: got 3 windows, expected one of each of num_layers = 2"),
        ({"window": (None, 2.0)}, TypeError, "window: got float, expected an int"),
        ({"attention_dropout": 1.5}, ValueError, "attention_dropout: got 1.5"),
        ({"eos_token_id": (3, VOCABULARY)}, ValueError, f"eos_token_id: got {VOCABULARY}"),
        ({"pad_token_id": -1}, ValueError, "pad_token_id: got -1"),
    ],
)
def test_config_refuses(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CausalConfig(VOCABULARY, **{**SIZES, **given})


def test_input_is_checked() -> None:
    model = build("GPT-2")
    with pytest.raises(TypeError, match="input_ids: got float32, expected int64"):
        model(torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"input_ids: got shape \(3,\)"):
        model(torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"attention_mask: got shape \(3, 4\)"):
        model(tokens(), torch.ones(BATCH, 4, dtype=torch.bool))
    with pytest.raises(TypeError, match="attention_mask: got float32"):
        model(tokens(), torch.ones(BATCH, LENGTH))
    with pytest.raises(ValueError, match="input_ids: got 33 tokens, expected at most max_length = 32"):
        model(tokens(33))
    with pytest.raises(ValueError, match="capacity: got 33 tokens"):
        model.new_cache(1, 33)


class Doubled(torch.nn.Module):
    """What a library puts in the place of a linear layer; its ``weight`` is that of the layer."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base, self.weight, self.bias = base, base.weight, base.bias

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.base(x)  # type: ignore[no-any-return]


@torch.no_grad()
@pytest.mark.parametrize("place", ["layers.0.in_proj", "layers.0.out_proj", "layers.1.feed_forward.linear2", "output"])
def test_a_replaced_linear_layer_is_called_decoding_too(place: str) -> None:
    model, expected = (build("Llama", torch.float32) for _ in range(2))
    expected.load_state_dict(model.state_dict())
    holder, name = model.get_submodule(place.rpartition(".")[0]), place.rpartition(".")[2]
    setattr(holder, name, Doubled(getattr(holder, name)))
    expected.get_parameter(f"{place}.weight").mul_(2)
    ids = tokens()
    torch.testing.assert_close(model(ids), expected(ids))
    cache = model.new_cache(BATCH, LENGTH)
    model.decode(ids[:, :-1], cache)
    torch.testing.assert_close(model.decode(ids[:, -1:], cache), expected(ids)[:, -1], rtol=1e-4, atol=1e-4)

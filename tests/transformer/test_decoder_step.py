"""A decoder's step in one native call: the numbers of separate calls, and left wherever more is asked for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrize

from fusedformer import nn, use_backend
from fusedformer.kernels.common import native
from fusedformer.kernels.common.backend import record_decisions
from fusedformer.transformer.attention import MultiheadAttention
from fusedformer.transformer.cache import KVCache
from fusedformer.transformer.models import CausalConfig, CausalLanguageModel
from tests.lanes import every_level
from tests.tolerances import assert_equal_bits, assert_within_contract

D, HEADS, BATCH, SOURCE, PROMPT = 32, 2, 2, 5, 3
STEPS = (1, 2, 9)  # tokens at a time


def decoder(dtype: torch.dtype = torch.float32, **options: Any) -> nn.TransformerDecoder:
    sizes: dict[str, Any] = {"d_model": D, "nhead": HEADS, "dim_feedforward": 40, "dropout": 0.0, "batch_first": True}
    layer = nn.TransformerDecoderLayer(**{**sizes, **options}, dtype=dtype)
    model = nn.TransformerDecoder(layer, 2).eval()
    for x in model.parameters():
        torch.nn.init.normal_(x, std=0.2)
    return model


def begin(model: Any, dtype: torch.dtype, copies: int = 1, masked: bool = True, **options: Any) -> KVCache:
    """A cache after a prompt; made twice from one seed, it is the same."""
    generator = torch.Generator().manual_seed(0)
    memory = torch.randn(BATCH, SOURCE, D, generator=generator).to(dtype)
    mask = torch.tensor([[True] * SOURCE, [True, False, True, True, False]]) if masked else None
    cache = KVCache(2, BATCH, HEADS, D // HEADS, PROMPT + sum(STEPS), dtype=dtype, device="cpu", **options)
    model.remember(memory, cache, mask)
    model.decode(torch.randn(BATCH, PROMPT, D, generator=generator).to(dtype), cache)
    cache.advance(torch.tensor([PROMPT, PROMPT - 1], dtype=torch.int32) if copies == 1 else PROMPT)
    cache.repeat(copies)
    return cache


def steps(model: Any, cache: KVCache, dtype: torch.dtype) -> list[Tensor]:
    generator, found = torch.Generator().manual_seed(1), []
    for length in STEPS:
        found.append(model.decode(torch.randn(len(cache.lengths), length, D, generator=generator).to(dtype), cache))
        cache.advance(length)
    return found


def layers_at_once(function: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each native call for a step computed."""
    taken: list[int] = []

    def short_way(operator: str, *arguments: Any, **others: Any) -> Tensor | None:
        out = original(operator, *arguments, **others)
        if operator == "decoder_step_cpu" and out is not None:
            key_caches = others["grouped"][2]
            taken.append(len(key_caches))
        return out

    original = native.short_way
    with monkeypatch.context() as patched:
        patched.setattr(native, "short_way", short_way)
        function()
    return taken


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "paper": ({}, {"masked": False}),
    "masked": ({}, {}),
    "pre-norm": ({"norm_first": True, "activation": "gelu"}, {}),
    "pages": ({"activation": torch.nn.functional.silu}, {"page": 4}),
    "copies": ({"norm_first": True}, {"copies": 3}),
    "no biases": ({"bias": False}, {}),
}


@every_level
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("said", OPTIONS)
def test_a_step_has_the_bits_of_separate_calls(
    said: str, dtype: torch.dtype, level: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_layer, of_cache = OPTIONS[said]
    model = decoder(dtype, **of_layer)
    found: list[Tensor] = []
    with torch.no_grad(), native.use_level(level):
        cache, other = (begin(model, dtype, **of_cache) for _ in range(2))
        assert layers_at_once(lambda: found.extend(steps(model, cache, dtype)), monkeypatch) == [2] * len(STEPS)
        with record_decisions():  # which no short way skips
            expected = steps(model, other, dtype)
    for out, long in zip(found, expected, strict=True):  # the later ones see what the earlier ones appended
        assert_equal_bits(out, long)


class Halved(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2


class Loud(MultiheadAttention):
    def attend_cached(self, x: Tensor, cache: KVCache, layer: int) -> Tensor:
        return 2 * super().attend_cached(x, cache, layer)


def hook(model: Any, name: str) -> None:
    model.layers[0].get_submodule(name).register_forward_hook(lambda module, args, out: 2 * out)


def replace(model: Any, **parts: Any) -> None:
    for name, part in parts.items():
        setattr(model.layers[0], name, part)


def make_plain(model: Any) -> None:
    weight = model.layers[0].linear1.weight
    del model.layers[0].linear1.weight
    model.layers[0].linear1.weight = weight.detach() * 2


CHANGES: dict[str, Callable[[Any], Any]] = {
    "hook on a norm": lambda model: hook(model, "norm2"),
    "hook on a product": lambda model: hook(model, "linear2"),
    "hook on the dropout": lambda model: hook(model, "dropout"),
    "another norm": lambda model: replace(model, norm3=torch.nn.Identity()),
    "another activation": lambda model: replace(model, activation=torch.sin),
    "a method of the layer": lambda model: replace(model, _attend_remembered=lambda x, cache, layer: x),
    "a network of its own": lambda model: replace(model, _ff_block=lambda x: x),
    "an attention's method": lambda model: setattr(
        model.layers[0].multihead_attn, "attend_memory", lambda x, key, value, mask: x
    ),
    "an attention's class": lambda model: setattr(model.layers[0].self_attn, "__class__", Loud),
    "a computed weight": lambda model: parametrize.register_parametrization(
        model.layers[0].self_attn, "in_proj_weight", Halved()
    ),
    "a computed weight of a part": lambda model: parametrize.register_parametrization(
        model.layers[0].self_attn.out_proj, "weight", Halved()
    ),
    "a computed bias": lambda model: parametrize.register_parametrization(model.layers[0].norm1, "bias", Halved()),
    "a weight that is no parameter": make_plain,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_changed_at_any_time_does_as_it_says(change: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder()
    with torch.no_grad():
        before = steps(model, begin(model, torch.float32), torch.float32)[0]
        cache, other = (begin(model, torch.float32) for _ in range(2))
        CHANGES[change](model)
        found: list[Tensor] = []
        made = layers_at_once(lambda: found.extend(steps(model, cache, torch.float32)), monkeypatch)
        with use_backend("reference"):
            expected = steps(model, other, torch.float32)
    assert made in ([], [1] * len(STEPS))  # the other layer is as it was
    assert not torch.equal(found[0], before)
    for out, long in zip(found, expected, strict=True):
        torch.testing.assert_close(out, long, rtol=1e-4, atol=1e-4)


def test_a_step_is_not_taken_where_something_watches(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder()

    def taken() -> list[int]:
        with torch.no_grad():
            cache = begin(model, torch.float32)
        return layers_at_once(lambda: steps(model, cache, torch.float32), monkeypatch)

    with torch.no_grad():
        if native.missing("decoder_step_cpu") is None:
            assert taken() == [2] * len(STEPS)
        for watching in (torch.autocast("cpu", torch.bfloat16), use_backend("reference"), record_decisions()):
            with watching:
                assert taken() == []
        model.train()
        model.layers[0].dropout.p = model.layers[1].dropout.p = 0.5
        assert taken() == []
    model.eval()
    with pytest.raises(ValueError, match="requires a gradient"):
        taken()


def test_a_full_cache_is_named(seed: int) -> None:
    model = decoder()
    with torch.no_grad(), pytest.raises(ValueError, match="key: got 99 tokens, expected at most 12"):
        model.decode(torch.randn(BATCH, 99, D), begin(model, torch.float32))


SIZES: dict[str, Any] = {"d_model": D, "nhead": HEADS, "num_layers": 2, "dim_feedforward": 40}
GROUPED = {**SIZES, "nhead": 4, "num_kv_heads": 2, "head_dim": 6}
STYLES = {
    "GPT-2": CausalConfig(50, **SIZES, max_length=30),
    "Llama": CausalConfig.llama(50, **GROUPED),
    "window": CausalConfig(50, **SIZES, max_length=30, window=2),
    "normed heads": CausalConfig.llama(50, **GROUPED, positions="sinusoidal", query_key_norm=True),
    "Qwen3": CausalConfig.llama(50, **GROUPED, window=(4, None), query_key_norm=True),
}


def language_model(style: str, dtype: torch.dtype) -> CausalLanguageModel:
    model = CausalLanguageModel(STYLES[style]).to(dtype)
    for x in model.parameters():
        torch.nn.init.normal_(x, std=0.2)
    return model


def logits_of_steps(model: CausalLanguageModel, page: int | None) -> Tensor:
    """Of steps of so many tokens as ``STEPS`` says, behind prompts of two lengths."""
    cache = model.new_cache(BATCH, PROMPT + sum(STEPS), page=page)
    ids = torch.randint(50, (BATCH, PROMPT + sum(STEPS)), generator=torch.Generator().manual_seed(0))
    prompt, *added = ids.split([PROMPT, *STEPS], 1)
    model.decode(prompt, cache, torch.tensor([PROMPT, PROMPT - 1], dtype=torch.int32))
    return torch.stack([model.decode(tokens, cache) for tokens in added])


@every_level
@pytest.mark.parametrize("page", [None, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("style", STYLES)
def test_a_language_models_step(
    style: str, dtype: torch.dtype, page: int | None, level: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = language_model(style, dtype)
    found: list[Tensor] = []
    with torch.no_grad(), native.use_level(level):
        calls = layers_at_once(lambda: found.append(logits_of_steps(model, page)), monkeypatch)
        with record_decisions():  # which no short way skips
            separate = logits_of_steps(model, page)
        with use_backend("reference"):
            eager, truth = logits_of_steps(model, page), logits_of_steps(copy.deepcopy(model).double(), page)
    assert calls == [2] * len(STEPS)
    if model.config.positions == "rotary":  # a rotation rounds otherwise in one call
        assert_within_contract(found[0], truth, [eager, separate], "logits")
    else:
        assert_equal_bits(found[0], separate)


def of_network(model: Any) -> Any:
    return model.layers[0].feed_forward


CHANGES_OF_LANGUAGE_MODELS: dict[str, Callable[[Any], Any]] = {
    "hook on the network": lambda model: of_network(model).register_forward_hook(lambda module, args, out: 2 * out),
    "another network": lambda model: replace(model, feed_forward=Doubled()),
    "another activation": lambda model: setattr(of_network(model), "activation", torch.sin),
    "a method of the layer": lambda model: replace(model, _merge=lambda out: out.transpose(1, 2).flatten(2)),
    "a computed weight": lambda model: parametrize.register_parametrization(
        model.layers[0].in_proj, "weight", Halved()
    ),
    "a computed weight of a norm": lambda model: parametrize.register_parametrization(
        model.layers[0].norm1, "weight", Halved()
    ),
    "a computed weight of the network": lambda model: parametrize.register_parametrization(
        of_network(model).linear2, "weight", Halved()
    ),
    "a computed weight of a head's norm": lambda model: parametrize.register_parametrization(
        model.layers[0].query_norm, "weight", Halved()
    ),
    "one head's norm": lambda model: replace(model, key_norm=None),
    "another named activation": lambda model: setattr(of_network(model), "activation", "relu2"),
}


class Doubled(torch.nn.Module):
    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return residual + 2 * x


@pytest.mark.parametrize("change", CHANGES_OF_LANGUAGE_MODELS)
def test_a_language_model_changed_at_any_time_does_as_it_says(
    change: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = language_model("Qwen3" if "head's norm" in change else "GPT-2", torch.float32)
    found: list[Tensor] = []
    with torch.no_grad():
        before = logits_of_steps(model, None)
        CHANGES_OF_LANGUAGE_MODELS[change](model)
        assert layers_at_once(lambda: found.append(logits_of_steps(model, None)), monkeypatch) == []
        with use_backend("reference"):
            expected = logits_of_steps(model, None)
    assert not torch.equal(found[0], before)
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-4)

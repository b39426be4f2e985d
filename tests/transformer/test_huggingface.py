"""``fuse`` on Hugging Face models, built small with random weights: outputs, gradients and tokens against "eager"."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fusedformer
from fusedformer import nn
from tests.tolerances import assert_within_contract

transformers = pytest.importorskip("transformers")

TEXT: dict[str, Any] = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
DECODER: dict[str, Any] = {**TEXT, **SIZE, "num_key_value_heads": 2}
BOTH: dict[str, Any] = {
    f"{side}_{name}": size
    for side in ("encoder", "decoder")
    for name, size in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))
}
GEMMA: dict[str, Any] = {"head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0}
MOE: dict[str, Any] = {
    "head_dim": 8,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "experts_implementation": "eager",
}
BATCH, LENGTH, WINDOW = 6, 11, 4

# Name: (model class, configuration class, its arguments)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "BERT": ("BertModel", "BertConfig", {**TEXT, **SIZE}),
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", {**TEXT, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "Llama": ("LlamaForCausalLM", "LlamaConfig", DECODER),
    "Mistral": ("MistralForCausalLM", "MistralConfig", {**DECODER, "sliding_window": WINDOW}),
    "Gemma 2": ("Gemma2ForCausalLM", "Gemma2Config", {**DECODER, **GEMMA, "sliding_window": WINDOW}),
    "gpt-oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {**DECODER, **MOE, "sliding_window": WINDOW},
    ),
    "BART": ("BartForConditionalGeneration", "BartConfig", {**TEXT, **BOTH, "d_model": 32}),
    "T5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {**TEXT, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
    ),
    "ViT": ("ViTModel", "ViTConfig", {**SIZE, "image_size": 16, "patch_size": 8}),
    "Whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {**TEXT, **BOTH, "d_model": 32, "num_mel_bins": 8, "max_source_positions": 16, "decoder_start_token_id": 1},
    ),
}
LANGUAGE = [name for name in MODELS if name not in ("ViT", "Whisper")]
GENERATING = [name for name in LANGUAGE if name not in ("BERT", "gpt-oss")]


def build(name: str) -> Any:
    """The model in eval mode with "eager" attention; weights large enough that attention is not nearly uniform."""
    model_class, config_class, options = MODELS[name]
    config = getattr(transformers, config_class)(**options, attn_implementation="eager")
    model = getattr(transformers, model_class)(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(1.0 if p.dim() == 1 else 0.0, 0.1)
    return model


def inputs_of(name: str, padding: str) -> tuple[dict[str, Tensor], Tensor]:
    """The arguments of a call, each sample with more padding; and (B, L), which positions of the result are real."""
    if name == "ViT":
        return {"pixel_values": torch.randn(BATCH, 3, 16, 16)}, torch.ones(BATCH, 5, dtype=torch.bool)
    places, pad = torch.arange(LENGTH), torch.arange(BATCH)[:, None]
    real = {"none": places >= 0 * pad, "left": places >= pad, "right": places < LENGTH - pad}[padding]
    decoder = {"decoder_input_ids": torch.randint(3, 64, (BATCH, 7))}
    if name == "Whisper":
        return {"input_features": torch.randn(BATCH, 8, 32), **decoder}, torch.ones(BATCH, 7, dtype=torch.bool)
    arguments = {"input_ids": torch.randint(3, 64, (BATCH, LENGTH))}
    if padding != "none":
        arguments["attention_mask"] = real.long()
    if name not in ("BART", "T5"):
        return arguments, real
    real = torch.arange(7) < 7 - pad
    return {**arguments, **decoder, "decoder_attention_mask": real.long()}, real


def evaluate(
    model: Any, arguments: dict[str, Tensor], real: Tensor, seed: int, at_once: int = BATCH
) -> dict[str, Tensor]:
    """The result at real positions and, in one vector, the gradients of all parameters; so many samples in one call."""
    model.zero_grad()
    arguments = {name: x.to(model.dtype) if x.is_floating_point() else x for name, x in arguments.items()}
    results = []
    for first in range(0, BATCH, at_once):
        out = model(**{name: x[first : first + at_once] for name, x in arguments.items()})
        results.append(out["logits"] if "logits" in out else out["last_hidden_state"])
    result = torch.cat(results)[real]
    generator = torch.Generator().manual_seed(seed)
    (result * torch.randn(result.shape, generator=generator).to(model.dtype)).sum().backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return {"result": result.detach(), "gradients": torch.cat([grad.flatten() for grad in grads])}


@pytest.fixture
def _finite_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets "eager" run in float64: its lowest number there is -inf in the float32 softmax, and rows of padding NaN."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask

    def float32_mask(**arguments: Any) -> Tensor | None:
        return eager_mask(**{**arguments, "dtype": torch.float32})

    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "eager", float32_mask)


@pytest.mark.usefixtures("_finite_masks")
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_is_as_accurate_as_eager(name: str, padding: str, seed: int) -> None:
    model = build(name)
    arguments, real = inputs_of(name, padding)
    fused = copy.deepcopy(model)
    report = fusedformer.fuse(fused)
    assert report.swapped
    assert not report.left
    truth = evaluate(copy.deepcopy(model).double(), arguments, real, seed)
    eager = [evaluate(model, arguments, real, seed, at_once) for at_once in (BATCH, 1)]
    for what, x in evaluate(fused, arguments, real, seed).items():
        assert_within_contract(x, truth[what], [attempt[what] for attempt in eager], what)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", GENERATING)
def test_generates_the_same_tokens(name: str, cache: str) -> None:
    model = build(name)
    arguments, _ = inputs_of(name, "left")
    arguments = {key: arguments[key] for key in ("input_ids", "attention_mask")}
    options: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    if cache == "static":
        options["cache_implementation"] = "static"
    expected = model.generate(**arguments, **options)
    fusedformer.fuse(model)
    assert torch.equal(model.generate(**arguments, **options), expected)
    fusedformer.unfuse(model)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", ["BERT", "Llama", "T5"])
def test_returns_attention_weights_when_asked(name: str) -> None:
    model = build(name)
    arguments, real = inputs_of(name, "right")
    fused = copy.deepcopy(model)
    fusedformer.fuse(fused)
    with torch.no_grad():
        outputs = [
            module(**arguments, output_attentions=True) for module in (copy.deepcopy(model).double(), model, fused)
        ]
    key = "decoder_attentions" if name == "T5" else "attentions"
    layers = [out[key] for out in outputs]
    assert len(layers[2]) == len(layers[0]) == 2
    for truth, eager, actual in zip(*layers, strict=True):
        keep = real[:, None, :, None].expand_as(actual)
        assert_within_contract(actual[keep], truth[keep].double(), eager[keep], "weights")


def test_verify_reports_every_output() -> None:
    model = build("Llama")
    report = fusedformer.fuse(model, verify=inputs_of("Llama", "none")[0])
    assert "" in report.swapped
    assert "model" not in report.swapped  # its configuration is the same
    assert report.differences is not None
    assert report.differences.keys() == {"output.logits"}
    assert 'attention "fusedformer" instead of "eager"' in str(report)


def test_a_model_compiles_whole_with_changing_lengths() -> None:
    model = build("Mistral")
    fusedformer.fuse(model)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    for length in (LENGTH, 2 * LENGTH):
        arguments = {"input_ids": torch.randint(3, 64, (2, length)), "use_cache": False}
        real = torch.arange(length) >= torch.tensor([[3], [0]])
        with torch.no_grad():
            expected, actual = (run(**arguments, attention_mask=real).logits[real] for run in (model, compiled))
        torch.testing.assert_close(actual, expected)


def test_attention_modules_inside_are_swapped_too() -> None:
    config = transformers.SiglipVisionConfig(**SIZE, image_size=16, patch_size=8)
    model = transformers.SiglipVisionModel(config).eval()
    original = copy.deepcopy(model)
    report = fusedformer.fuse(model)
    assert {"", "head.attention", "encoder.layers.0.mlp.fc1"} <= set(report.swapped)
    assert "head.attention.out_proj" not in report.swapped
    assert type(model.head.attention) is nn.MultiheadAttention
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(model(pixels).pooler_output, original(pixels).pooler_output)
    fusedformer.unfuse(model)
    assert type(model.head.attention) is torch.nn.MultiheadAttention


def implementations(model: torch.nn.Module) -> dict[str, str]:
    models = {name: part for name, part in model.named_modules() if isinstance(part, transformers.PreTrainedModel)}
    return {name: part.config._attn_implementation for name, part in models.items()}


def bloom() -> Any:
    return transformers.BloomModel(transformers.BloomConfig(**TEXT, hidden_size=32, n_layer=1, n_head=4))


def splinter() -> Any:
    return transformers.SplinterModel(transformers.SplinterConfig(**{**TEXT, **SIZE, "num_hidden_layers": 1}))


class Pair(transformers.PreTrainedModel):  # type: ignore[misc,name-defined]
    """Two models whose configurations are none of its own."""

    config_class = transformers.PreTrainedConfig
    _supports_sdpa = True

    def __init__(self) -> None:
        super().__init__(transformers.PreTrainedConfig())
        self.first, self.second = build("BERT"), splinter()


@pytest.mark.parametrize(
    ("make", "swapped", "left"),
    [
        (lambda: torch.nn.ModuleDict({"first": build("BERT"), "second": bloom()}), ["first"], ["second"]),
        (Pair, ["", "first"], ["second"]),
        (bloom, [], [""]),
        (lambda: build("T5"), ["", "encoder", "decoder"], []),
    ],
    ids=["modules", "models without sub-configurations", "root", "sub-configurations"],
)
def test_each_model_is_swapped_or_left_on_its_own(make: Callable[[], Any], swapped: list[str], left: list[str]) -> None:
    model = make()
    before = implementations(model)
    report = fusedformer.fuse(model)
    assert [name for name in report.swapped if name in before] == swapped
    assert list(report.left) == left
    after = implementations(model)
    assert all(after[name] == "fusedformer" for name in swapped)
    for name in left:
        assert after[name] == before[name]
        assert report.left[name] in (
            "its attention does not go through transformers' AttentionInterface",
            "transformers knows eager attention alone for it",
        )
    again = fusedformer.fuse(model)
    assert again.swapped == []
    assert implementations(model) == after
    fusedformer.unfuse(model)
    assert implementations(model) == before

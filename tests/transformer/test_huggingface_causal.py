"""GPT-2, Llama and its like, built small and random: our model with their weights computes what they do."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedformer.transformer.models import CausalLanguageModel
from fusedformer.transformer.models.huggingface_causal import CONVERTERS
from tests.tolerances import assert_equal_bits, assert_within_contract

transformers = pytest.importorskip("transformers")
VOCABULARY, BATCH, LENGTH = 41, 4, 11
TOKENS: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT2: dict[str, Any] = {**TOKENS, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 32}
LLAMA: dict[str, Any] = {
    **TOKENS,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
}
WINDOW = 4  # fewer than the tokens of any row
SLIDING: dict[str, Any] = {"use_sliding_window": True, "sliding_window": WINDOW}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# Name: (their class, its configuration's, arguments).
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "GPT-2, other sizes": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {**GPT2, "n_inner": 20, "activation_function": "relu", "tie_word_embeddings": False},
    ),
    "Llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "Llama 3.1, with biases": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {**LLAMA, "head_dim": 10, "rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True},
    ),
    "Mistral": ("MistralForCausalLM", "MistralConfig", {**LLAMA, "sliding_window": None}),
    "Mistral, window": ("MistralForCausalLM", "MistralConfig", {**LLAMA, "sliding_window": WINDOW}),
    "Qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**LLAMA, "tie_word_embeddings": True}),
    "Qwen2, window": ("Qwen2ForCausalLM", "Qwen2Config", {**LLAMA, **SLIDING, "max_window_layers": 1}),
    "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**LLAMA, "head_dim": 10}),
    "Qwen3, window": (
        "Qwen3ForCausalLM",
        "Qwen3Config",
        {**LLAMA, **SLIDING, "head_dim": 6, "layer_types": ["sliding_attention", "full_attention"]},
    ),
}


def stock(name: str, **others: Any) -> Any:
    """In eval mode; weights large enough that attention is not nearly uniform."""
    model_class, config_class, options = MODELS[name]
    config = getattr(transformers, config_class)(**{**options, **others}, attn_implementation="sdpa")
    model = getattr(transformers, model_class)(config).eval()
    with torch.no_grad():
        for x in model.parameters():
            x.normal_(1.0 if x.dim() == 1 else 0.0, 0.15)
    return model


def exact(model: Any) -> Any:
    """A copy in float64, whose norms, which theirs compute in float32 whatever comes, are float64 too."""
    model = copy.deepcopy(model).double()
    for module in model.modules():
        for name, child in module.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                own = torch.nn.RMSNorm(child.weight.shape, child.variance_epsilon, dtype=torch.float64)
                own.weight = child.weight
                setattr(module, name, own)
    return model


def padded(padding: str) -> Tensor:
    places, pad = torch.arange(LENGTH), torch.arange(BATCH)[:, None]
    return {"none": places >= 0 * pad, "left": places >= pad, "right": places < LENGTH - pad}[padding]


def evaluate(model: Any, ids: Tensor, real: Tensor, weight: Tensor, at_once: int = BATCH) -> tuple[Tensor, Tensor]:
    """Logits of what is real, and the gradients of all parameters, by our names; so many rows in one call."""
    model.zero_grad()
    is_ours = isinstance(model, CausalLanguageModel)
    rows = []
    for x, part in zip(ids.split(at_once), real.split(at_once), strict=True):
        mask = None if part.all() else part.long()
        positions = (part.cumsum(1) - 1).clamp(min=0)
        rows.append(model(x, mask) if is_ours else model(x, attention_mask=mask, position_ids=positions).logits)
    logits = torch.cat(rows)[real]
    (logits * weight.to(logits.dtype)).sum().backward()
    grads = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    if not is_ours:
        converter = CONVERTERS[model.config.model_type]
        grads = converter.weights(grads, converter.config(model.config.to_dict()))
    return logits.detach(), torch.cat([grads[name].flatten() for name in sorted(grads)])


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_theirs(name: str, padding: str, seed: int) -> None:
    theirs = stock(name)
    ours = CausalLanguageModel.from_huggingface(theirs)
    ids, real = torch.randint(3, VOCABULARY, (BATCH, LENGTH)), padded(padding)
    weight = torch.randn(int(real.sum()), VOCABULARY)
    (logits, grads), (true_logits, true_grads) = (evaluate(x, ids, real, weight) for x in (ours, exact(theirs)))
    # In one call and row by row: the same sums in other orders.
    eager_logits, eager_grads = zip(*(evaluate(theirs, ids, real, weight, rows) for rows in (BATCH, 1)), strict=True)
    assert_within_contract(logits, true_logits, eager_logits, "logits")
    assert_within_contract(grads, true_grads, eager_grads, "gradients")


@pytest.mark.parametrize("name", ["GPT-2", "Llama", "Qwen3, window"])
@torch.no_grad()
def test_autocast_is_as_accurate_as_theirs(name: str, seed: int) -> None:
    """Whole, and decoding: the residual stream stays in float32."""
    theirs = stock(name)
    ours = CausalLanguageModel.from_huggingface(theirs)
    ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH))
    truth = exact(theirs)(input_ids=ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        eager, actual = theirs(input_ids=ids).logits, ours(ids)
        cache = ours.new_cache(BATCH, LENGTH)
        decoded = [ours.decode(ids[:, i : i + 1], cache) for i in range(LENGTH)]
    assert actual.dtype == eager.dtype == torch.bfloat16
    assert_within_contract(actual, truth, eager)
    assert_within_contract(torch.stack(decoded, 1), truth, eager, "decoded")


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_theirs(name: str) -> None:
    theirs = stock(name)
    ours = CausalLanguageModel.from_huggingface(theirs)
    ids, real = torch.randint(3, VOCABULARY, (BATCH, LENGTH)), padded("left")
    options: dict[str, Any] = {"max_new_tokens": 9, "min_new_tokens": 9}
    expected = theirs.generate(input_ids=ids, attention_mask=real.long(), do_sample=False, **options)
    for page in (None, 4):
        assert torch.equal(ours.generate(ids, real.long(), **options, page=page), expected)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("GPT-2", {"activation_function": "tanh"}),
        ("GPT-2", {"scale_attn_weights": False}),
        ("GPT-2", {"scale_attn_by_inverse_layer_idx": True}),
        ("GPT-2", {"add_cross_attention": True}),
        ("Llama", {"hidden_act": "mish"}),
        ("Llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}),
        ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
        ("Llama", {"quantization_config": {"quant_method": "gptq"}}),
        ("Llama", {"num_hidden_layers": None}),
        ("Mistral", {"layer_types": ["sliding_attention", "full_attention"]}),
        ("Qwen2", {"layer_types": ["chunked_attention", "full_attention"]}),
        ("Qwen2", {"layer_types": ["sliding_attention", "full_attention"]}),
        ("Qwen3", {"hidden_act": "mish"}),
    ],
)
def test_refuses_by_name_what_it_does_not_compute(name: str, given: dict[str, Any]) -> None:
    model = stock(name)
    config = {**model.config.to_dict(), **given}
    model.config.to_dict = lambda: config
    field, value = next(iter(given.items()))
    with pytest.raises(ValueError, match="|".join([field, *(value if isinstance(value, dict) else ())])):
        CausalLanguageModel.from_huggingface(model)


def test_a_projection_that_is_missing_is_named() -> None:
    model = stock("Llama")
    del model.model.layers[1].self_attn.k_proj.weight
    with pytest.raises(ValueError, match=r"missing layers\.1\.in_proj\.weight and unexpected .*q_proj"):
        CausalLanguageModel.from_huggingface(model)


@pytest.mark.parametrize("name", ["GPT-2", "Llama"])
def test_reads_a_folder_in_the_names_of_old(name: str, tmp_path: Path) -> None:
    """Base models without a prefix, with buffers; rotary settings at the top of the config."""
    from safetensors.torch import save_file

    model = stock(name)
    expected = CausalLanguageModel.from_huggingface(model)
    prefix = "transformer." if name == "GPT-2" else "model."
    weights = {key.removeprefix(prefix): x.clone() for key, x in model.state_dict().items()}
    config = model.config.to_dict()
    if name == "GPT-2":
        del weights["lm_head.weight"]
        weights["h.0.attn.bias"] = torch.ones(1, 1, 32, 32, dtype=torch.bool)
    else:
        weights["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
        theta = config.pop("rope_parameters")["rope_theta"]
        config |= {"rope_theta": theta, "rope_scaling": None}
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = CausalLanguageModel.from_pretrained(tmp_path)
    assert found.config == expected.config
    for key, x in expected.state_dict().items():
        assert_equal_bits(found.state_dict()[key], x, key)

"""Checkpoints of GPT-2, and of Llama and its like, as :class:`~fusedformer.transformer.models.CausalLanguageModel`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..rotary import SCALINGS
from .causal import CausalConfig
from .pretrained import ACTIVATIONS, Converter, check_supported

# Names in theirs and in ours. GPT-2's matrices lie transposed.
GPT2_OUTER = {"wte": "embedding", "wpe": "positions", "ln_f": "norm", "lm_head": "output"}
GPT2_LAYER = {
    "ln_1": "norm1",
    "attn.c_attn": "in_proj",
    "attn.c_proj": "out_proj",
    "ln_2": "norm2",
    "mlp.c_fc": "feed_forward.linear1",
    "mlp.c_proj": "feed_forward.linear2",
}
LLAMA_OUTER = {"embed_tokens": "embedding", "norm": "norm", "lm_head": "output"}
LLAMA_LAYER = {
    "input_layernorm": "norm1",
    "self_attn.qkv_proj": "in_proj",
    "self_attn.q_norm": "query_norm",
    "self_attn.k_norm": "key_norm",
    "self_attn.o_proj": "out_proj",
    "post_attention_layernorm": "norm2",
    "mlp.gate_proj": "feed_forward.linear_gate",
    "mlp.up_proj": "feed_forward.linear1",
    "mlp.down_proj": "feed_forward.linear2",
}
FULL, SLIDING = "full_attention", "sliding_attention"  # what Qwen's "layer_types" may be
PARTS = ("q_proj", "k_proj", "v_proj")  # of Llama's qkv_proj, which is three matrices


def _gpt2_config(config: Mapping[str, Any]) -> CausalConfig:
    _check_required(config, "vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
    check_supported(
        config,
        {
            "activation_function": ACTIVATIONS,
            "scale_attn_weights": [True],
            "scale_attn_by_inverse_layer_idx": [False],
            "add_cross_attention": [False],
        },
    )
    return CausalConfig(
        config["vocab_size"],
        d_model=config["n_embd"],
        nhead=config["n_head"],
        num_layers=config["n_layer"],
        dim_feedforward=config.get("n_inner"),
        activation=ACTIVATIONS[config.get("activation_function", "gelu_new")],
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        max_length=config["n_positions"],
        tie_embeddings=config.get("tie_word_embeddings", True),
        dropout=config.get("resid_pdrop", 0.1),
        embedding_dropout=config.get("embd_pdrop", 0.1),
        attention_dropout=config.get("attn_pdrop", 0.1),
        **_tokens(config),
    )


def _llama_config(config: Mapping[str, Any]) -> CausalConfig:
    both = config.get("attention_bias", False)
    return _like_llama(config, both, both, config.get("mlp_bias", False))


def _mistral_config(config: Mapping[str, Any]) -> CausalConfig:
    check_supported(config, {"layer_types": [None]})
    return _like_llama(config, False, False, False, window=config.get("sliding_window", 4096))


def _qwen2_config(config: Mapping[str, Any]) -> CausalConfig:
    return _like_llama(config, True, False, False, window=_window(config))


def _qwen3_config(config: Mapping[str, Any]) -> CausalConfig:
    both = config.get("attention_bias", False)
    config = {"head_dim": 128, **config}
    return _like_llama(config, both, both, False, window=_window(config), query_key_norm=True)


def _window(config: Mapping[str, Any]) -> int | tuple[int | None, ...] | None:
    """Qwen's windows: of the layers that "layer_types" names, or of those from "max_window_layers" on."""
    _check_required(config, "num_hidden_layers")
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window", False) else None
    kinds = config.get("layer_types")
    if kinds is None:
        full = config.get("max_window_layers", 28)
        kinds = [FULL if i < full or window is None else SLIDING for i in range(config["num_hidden_layers"])]
    for kind in kinds:
        if kind not in (FULL, SLIDING) or (kind == SLIDING and window is None):
            supported = f"{[FULL, SLIDING]}, the second with a sliding_window and use_sliding_window"
            raise ValueError(f"layer_types: got {kind!r} in the Hugging Face config, supported: {supported}")
    windows = tuple(window if kind == SLIDING else None for kind in kinds)
    same = len(windows) == config["num_hidden_layers"] and len(set(windows)) == 1
    return windows[0] if same else windows


def _like_llama(
    config: Mapping[str, Any], attention_bias: bool, output_bias: bool, feed_forward_bias: bool, **others: Any
) -> CausalConfig:
    _check_required(
        config, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"
    )
    check_supported(config, {"hidden_act": ACTIVATIONS})
    theta, scaling = _rope(config)
    return CausalConfig.llama(
        config["vocab_size"],
        d_model=config["hidden_size"],
        nhead=config["num_attention_heads"],
        num_kv_heads=config.get("num_key_value_heads"),
        head_dim=config.get("head_dim"),
        num_layers=config["num_hidden_layers"],
        dim_feedforward=config["intermediate_size"],
        activation=ACTIVATIONS[config.get("hidden_act", "silu")],
        norm_eps=config.get("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        attention_bias=attention_bias,
        output_bias=output_bias,
        feed_forward_bias=feed_forward_bias,
        tie_embeddings=config.get("tie_word_embeddings", False),
        attention_dropout=config.get("attention_dropout", 0.0),
        **others,
        **_tokens(config),
    )


def _rope(config: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Theta and scaling: under "rope_parameters", or at the top and under "rope_scaling" before transformers 5."""
    given = {"rope_theta": config.get("rope_theta", 10000.0), **(config.get("rope_scaling") or {})}
    given = dict(config.get("rope_parameters") or given)
    kind = given.get("rope_type", given.get("type", "default"))
    check_supported({**given, "rope_type": kind}, {"rope_type": SCALINGS, "partial_rotary_factor": [None, 1.0]})
    _check_required(given, *SCALINGS[kind])
    scaling = {"rope_type": kind, **{name: given[name] for name in SCALINGS[kind]}}
    return given.get("rope_theta", 10000.0), None if kind == "default" else scaling


def _tokens(config: Mapping[str, Any]) -> dict[str, Any]:
    tokens = {name: config.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {name: tuple(token) if isinstance(token, list) else token for name, token in tokens.items()}


def _check_required(config: Mapping[str, Any], *names: str) -> None:
    missing = [name for name in names if config.get(name) is None]
    if missing:
        raise ValueError(f"the Hugging Face config lacks {', '.join(missing)}")


def _gpt2_weights(weights: Mapping[str, Tensor], config: CausalConfig) -> dict[str, Tensor]:
    result = {}
    for name, x in weights.items():
        if name.endswith((".attn.bias", ".attn.masked_bias")):  # a causal mask, in checkpoints of old
            continue
        ours = _renamed(name, "transformer.", "h", GPT2_OUTER, GPT2_LAYER) or name
        result[ours] = x.t() if ours.startswith("layers.") and x.dim() == 2 else x
    return result


def _llama_weights(weights: Mapping[str, Tensor], config: CausalConfig) -> dict[str, Tensor]:
    left = {name: x for name, x in weights.items() if not name.endswith(".rotary_emb.inv_freq")}
    for name in weights:
        parts = [name.replace(".q_proj.", f".{part}.") for part in PARTS]
        if ".q_proj." in name and all(part in left for part in parts):
            left[name.replace(".q_proj.", ".qkv_proj.")] = torch.cat([left.pop(part) for part in parts])
    return {_renamed(name, "model.", "layers", LLAMA_OUTER, LLAMA_LAYER) or name: x for name, x in left.items()}


def _renamed(name: str, prefix: str, layers: str, outer: Mapping[str, str], inner: Mapping[str, str]) -> str | None:
    """Our name of their weight, None if there is none; their base models' names have no prefix."""
    stem, _, leaf = name.removeprefix(prefix).rpartition(".")
    if stem in outer:
        return f"{outer[stem]}.{leaf}"
    folder, number, *rest = stem.split(".", 2) if stem.count(".") > 1 else (stem, "")
    if folder == layers and rest and rest[0] in inner:
        return f"layers.{number}.{inner[rest[0]]}.{leaf}"
    return None


CONVERTERS = {
    "gpt2": Converter(_gpt2_config, _gpt2_weights),
    "llama": Converter(_llama_config, _llama_weights),
    "mistral": Converter(_mistral_config, _llama_weights),
    "qwen2": Converter(_qwen2_config, _llama_weights),
    "qwen3": Converter(_qwen3_config, _llama_weights),
}

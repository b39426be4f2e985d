"""BART's and Marian's checkpoints as :class:`~fusedformer.transformer.models.Seq2SeqTransformer`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .pretrained import ACTIVATIONS, Converter, check_supported
from .seq2seq import Seq2SeqConfig

# Their names into ours, one after the other.
NAMES = (
    (r"^model\.", ""),
    (r"^(shared|encoder\.embed_tokens|decoder\.embed_tokens)\.", "embedding."),
    (r"^(encoder|decoder)\.embed_positions\.", r"\1_input.positions."),
    (r"^(encoder|decoder)\.layernorm_embedding\.", r"\1_input.norm."),
    (r"\.self_attn_layer_norm\.", ".norm1."),
    (r"\.encoder_attn_layer_norm\.", ".norm2."),
    (r"^(encoder\..*)\.final_layer_norm\.", r"\1.norm2."),
    (r"^(decoder\..*)\.final_layer_norm\.", r"\1.norm3."),
    (r"\.encoder_attn\.", ".multihead_attn."),
    (r"\.fc([12])\.", r".linear\1."),
    (r"^lm_head\.", "output."),
)
# The dimension of each of our weights that holds what the layers hand on.
FEATURES = (
    (r"^(embedding|output)\.weight$", 1),
    (r"\.in_proj_weight$", 1),
    (r"\.out_proj\.(weight|bias)$", 0),
    (r"\.linear1\.weight$", 1),
    (r"\.linear2\.(weight|bias)$", 0),
    (r"\.norm\d\.(weight|bias)$", 0),
)
LEARNED_FROM = 2  # BART's tables of positions begin with two rows that nothing reads


def bart_config(theirs: Mapping[str, Any]) -> Seq2SeqConfig:
    """Our config of a BART."""
    return _config(theirs, positions="learned", max_length=theirs["max_position_embeddings"], embedding_norm=True)


def bart_weights(theirs: Mapping[str, Tensor], config: Seq2SeqConfig) -> dict[str, Tensor]:
    """A BART's weights, by our names."""
    ours = _weights(theirs)
    for name in ("encoder_input.positions.weight", "decoder_input.positions.weight"):
        if name in ours:
            ours[name] = ours[name][LEARNED_FROM:]
    bias = ours.pop("final_logits_bias", None)
    if bias is not None and bias.any():
        raise ValueError("final_logits_bias: got a bias of the logits, expected zeros, as BART is trained without one")
    return ours


def marian_config(theirs: Mapping[str, Any]) -> Seq2SeqConfig:
    """Our config of a Marian."""
    if theirs["d_model"] % 2:
        raise ValueError(f"d_model: got {theirs['d_model']} in the Hugging Face config, supported: even numbers")
    return _config(theirs, output_bias=True)


def marian_weights(theirs: Mapping[str, Tensor], config: Seq2SeqConfig) -> dict[str, Tensor]:
    """A Marian's weights, by our names; its positions hold all sines before all cosines, so features change places."""
    order = torch.arange(config.d_model).view(2, -1).T.flatten()
    ours = {name: x for name, x in _weights(theirs).items() if not name.endswith("_input.positions.weight")}
    for name, x in ours.items():
        for pattern, dim in FEATURES:
            if re.search(pattern, name):
                ours[name] = x.index_select(dim, order.to(x.device))
    if "final_logits_bias" in ours:
        ours["output.bias"] = ours.pop("final_logits_bias").flatten()
    return ours


def _config(theirs: Mapping[str, Any], **others: Any) -> Seq2SeqConfig:
    supported = {
        "is_encoder_decoder": [True],
        "activation_function": ACTIVATIONS,
        "encoder_attention_heads": [theirs["decoder_attention_heads"]],
        "encoder_ffn_dim": [theirs["decoder_ffn_dim"]],
        "encoder_layerdrop": [0.0],
        "decoder_layerdrop": [0.0],
        "tie_word_embeddings": [True],
        "share_encoder_decoder_embeddings": [True],
        "decoder_vocab_size": [None, theirs["vocab_size"]],
    }
    check_supported(theirs, supported)
    return Seq2SeqConfig(
        vocab_size=theirs["vocab_size"],
        d_model=theirs["d_model"],
        nhead=theirs["decoder_attention_heads"],
        num_encoder_layers=theirs["encoder_layers"],
        num_decoder_layers=theirs["decoder_layers"],
        dim_feedforward=theirs["decoder_ffn_dim"],
        activation=ACTIVATIONS[theirs["activation_function"]],
        dropout=theirs["dropout"],
        attention_dropout=theirs["attention_dropout"],
        activation_dropout=theirs["activation_dropout"],
        scale_embedding=theirs["scale_embedding"],
        pad_token_id=theirs["pad_token_id"],
        bos_token_id=theirs["bos_token_id"],
        eos_token_id=theirs["eos_token_id"],
        decoder_start_token_id=theirs["decoder_start_token_id"],
        **others,
    )


def _weights(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By our names; query, key and value of an attention in one tensor."""
    ours: dict[str, Tensor] = {}
    for name, x in theirs.items():
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        ours[name] = x
    for name in [name for name in ours if ".q_proj." in name]:
        parts = [name.replace(".q_proj.", f".{letter}_proj.") for letter in "qkv"]
        if all(part in ours for part in parts):
            ours[name.replace(".q_proj.", ".in_proj_")] = torch.cat([ours.pop(part) for part in parts])
    return ours


CONVERTERS = {"bart": Converter(bart_config, bart_weights), "marian": Converter(marian_config, marian_weights)}

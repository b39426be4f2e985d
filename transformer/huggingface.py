"""Hugging Face transformers: attention and mask functions under the name "fusedformer", and choosing them for a model.

transformers builds an attention mask once per forward, (B, 1, L, S) bools, and hands it to the attention of every
layer. Most say no more than which keys are padding: the rest is causality, maybe a window. Of those,
:func:`compact_mask` keeps the padding alone, and its dtype says what is left to :func:`fused_attention`:

    bool   (B, 1 | H, 1 | L, S)   who attends to whom, all of it
    uint8  (B, 1, 1, S)           1 where no padding is; causal besides, the last query standing at the last key
    int8   (B, W, 1, S)           the same, and a query sees no more than W keys; stride 0 in W

Four dimensions, because transformers passes such masks on untouched where it would prepare others again, and because
models cut rows off them; never bool, so that nothing takes a compact mask for a whole one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from ..kernels.attention.api import attention, attention_weights
from ..kernels.common.checks import dtype_name

NAME = "fusedformer"

# Passed to every attention, and read by no eager one in transformers. The window of ``sliding_window`` is in the mask,
# and so are the packed sequences of the ``cu_seq_lens``.
WITHOUT_EFFECT = frozenset(
    {
        "cache_position",
        "cu_seq_lens_k",
        "cu_seq_lens_q",
        "deterministic",
        "encoder_attention_mask",
        "encoder_hidden_states",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "past_key_values",
        "position_ids",
        "return_dict",
        "seq_idx",
        "sliding_window",
        "use_cache",
    }
)


def register() -> None:
    """Makes ``attn_implementation="fusedformer"`` known to transformers."""
    AttentionInterface.register(NAME, fused_attention)
    AttentionMaskInterface.register(NAME, compact_mask)


def fused_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    output_attentions: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function of transformers' ``AttentionInterface``.

    Args:
        module: the attention layer; its ``is_causal`` counts where the argument is None, as in transformers' "sdpa".
        query: (B, H, L, E).
        key: (B, Hkv, S, E).
        value: (B, Hkv, S, Ev).
        attention_mask: None, from :func:`compact_mask`, or 4-D bool (True = takes part) or floating (added).
        dropout: probability of dropping an attention weight.
        scaling: of the products; 1/sqrt(E) if None.
        is_causal: without a mask, whether query i sees the keys up to i alone; a mask says it itself.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        s_aux: (H,), attention sinks.
        position_bias: broadcasts to (B, H, L, S); added to the scores, with gradient.
        output_attentions: also return the weights; the layer's configuration says it if None.
        **kwargs: what else transformers passes on: ``WITHOUT_EFFECT``, or None.

    Returns:
        ``(output, weights)``: (B, L, H, Ev), contiguous, and (B, H, L, S) or None.

    Raises:
        ValueError: a keyword argument that may change the result and is not known here, or a mask of another kind.
    """
    unknown = [name for name, x in kwargs.items() if name not in WITHOUT_EFFECT and x is not None and x is not False]
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: {type(module).__name__} passes what this attention does not support")
    if output_attentions is None:
        output_attentions = getattr(getattr(module, "config", None), "output_attentions", False)
    attn_mask, key_mask, window, causal = _read_mask(attention_mask)
    if attention_mask is None:
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    problem: dict[str, Any] = {
        "attn_mask": _with_bias(attn_mask, position_bias),
        "is_causal": causal if query.size(2) > 1 else False,  # a single query stands at the last key
        "scale": scaling,
        "enable_gqa": True,
        "key_mask": key_mask,
        "causal_alignment": "top_left" if attention_mask is None else "bottom_right",
        "window": None if window is None else (window - 1, None),
        "softcap": softcap,
        "dropout_p": dropout,
    }
    weights = None
    if output_attentions:
        seed = torch.randint(2**62, (2,), device=query.device) if dropout > 0.0 else None
        out, lse = attention(query, key, value, sinks=s_aux, return_lse=True, seed=seed, **problem)
        weights = attention_weights(query, key, lse, seed=seed, average_heads=False, **problem)
    else:
        out = attention(query, key, value, sinks=s_aux, **problem)
    return out.transpose(1, 2).contiguous(), weights


def _read_mask(mask: Tensor | None) -> tuple[Tensor | None, Tensor | None, int | None, bool]:
    """``(attn_mask, key_mask, window, causal)`` that a mask says; its kinds are at the top of this file."""
    if mask is None:
        return None, None, None, False
    if mask.dim() == 4 and (mask.dtype == torch.bool or mask.is_floating_point()):
        if mask.size(1) == mask.size(2) == 1:
            return None, mask[:, 0, 0], None, False
        return mask, None, None, False
    is_windowed = mask.dtype == torch.int8
    if mask.dim() != 4 or mask.size(2) != 1 or not (is_windowed or (mask.dtype == torch.uint8 and mask.size(1) == 1)):
        got = f"{dtype_name(mask.dtype)} of shape {tuple(mask.shape)}"
        raise ValueError(f"attention_mask: got {got}, expected 4-D bool or floating, or what compact_mask returned")
    return None, mask[:, 0, 0].view(torch.bool), mask.size(1) if is_windowed else None, True


def _with_bias(mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
    if bias is None or mask is None:
        return mask if bias is None else bias
    return bias.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else bias + mask


def compact_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask function of transformers' ``AttentionMaskInterface``; its arguments are those of ``sdpa_mask`` there.

    Nothing of size L x S is made for transformers' own causal, sliding and bidirectional masks, where they may be
    skipped (the ``allow_..._skip``: nothing else is overlaid) and, unless bidirectional, the queries end where the keys
    end. All else, such as a static cache that is not full, gets the whole bool mask. No mask is read on the host.
    """
    padding, is_padding = None, attention_mask is None
    if attention_mask is not None and attention_mask.dim() == 2:
        missing = kv_offset + kv_length - attention_mask.size(1)
        padding = torch.nn.functional.pad(attention_mask, (0, missing)) if missing > 0 else attention_mask
        padding, is_padding = padding[:, None, None, kv_offset : kv_offset + kv_length].bool(), True
    if is_padding and allow_is_bidirectional_skip and mask_function is bidirectional_mask_function:
        return padding
    window = None
    if mask_function is causal_mask_function:
        window = kv_length
    elif local_size is not None and _is_window(local_size, config):
        window = min(local_size, kv_length)
    ends_meet = not isinstance(q_offset, Tensor) and q_offset + q_length == kv_offset + kv_length
    if is_padding and allow_is_causal_skip and ends_meet and window is not None:
        if padding is None:
            if window == kv_length and q_length in (1, kv_length):
                return None  # `fused_attention` then goes by the layer's own `is_causal`, as transformers' "sdpa" does
            padding = torch.ones((1, 1, 1, kv_length), dtype=torch.bool, device=device)
        if window == kv_length:
            return padding.view(torch.uint8)
        return padding.view(torch.int8).expand(-1, window, -1, -1)
    whole: Tensor | None = sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        mask_function,
        attention_mask,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        device=device,
        **kwargs,
    )
    return whole


def _is_window(local_size: int, config: Any) -> bool:
    # Chunked attention says its size in the same place, and under torch.compile nothing else tells the two apart.
    return local_size == getattr(config, "sliding_window", None) != getattr(config, "attention_chunk_size", None)


def models(model: torch.nn.Module) -> list[tuple[str, PreTrainedModel]]:
    """The Hugging Face models in ``model``, by name; of those with the same configuration, the outermost."""
    found: dict[int, tuple[str, PreTrainedModel]] = {}
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            found.setdefault(id(module.config), (name, module))
    return list(found.values())


def refusal(model: PreTrainedModel) -> str | None:
    """Why the model's attention cannot be chosen; None when it can."""
    if not model._can_set_attn_implementation():
        return "its attention does not go through transformers' AttentionInterface"
    if not (model._supports_sdpa or model._supports_flash_attn or model._supports_flex_attn):
        return "transformers knows eager attention alone for it"
    return None


def implementation(model: PreTrainedModel) -> str:
    """The name of the attention that the model runs."""
    return str(model.config._attn_implementation)


def choose(model: PreTrainedModel, name: str) -> None:
    """Makes the model run this attention; models inside it with a configuration of their own are left as they are."""
    # `set_attn_implementation` would reach into those whose configuration is no part of the model's.
    model.config._attn_implementation = {"": name}

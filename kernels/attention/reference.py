"""The paper's equation in eager torch: the oracle every kernel is held to.

    Attention(Q, K, V) = softmax(Q Kᵀ / √d_k) V             Vaswani et al., "Attention Is All You Need", equation (1)

with the rest of the contract around it: softcap, ALiBi, additive and excluding masks, sinks, dropout, empty rows. Any
dtype and device, differentiable to any order. Half inputs are computed in fp32, as the kernels accumulate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common import philox
from ..common.autocast import no_autocast
from .masks import band, query_positions, takes_part
from .problem import AttentionProblem


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    key_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    scale: float,
    position_offset: int | Tensor,  # or one for each sequence, (B, 1, 1, 1)
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(out, lse, weights)`` of a canonical problem (``problem.AttentionProblem``).

    (B, H, L, Ev) in the dtype of query; (B, H, L) and (B, H, L, S), after dropout, in the dtype of the computation.
    """
    with no_autocast(query.device.type):
        scores = _scores(
            query, key, attn_mask, key_mask, alibi_slopes, scale, position_offset, window_left, window_right, softcap
        )
        weights, lse = _softmax(scores, sinks)
        weights = philox.dropout(weights, seed, dropout_p, philox.STREAM_ATTENTION)
        out = weights @ _used_slots(value, query, key_mask).to(weights.dtype)
        return out.to(query.dtype), lse, weights


def attention_weights(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    key_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    seed: Tensor | None,
    scale: float,
    position_offset: int,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
    average_heads: bool,
) -> Tensor:
    """The weights that multiply the values, from the log-sum-exp: (B, H, L, S), or (B, L, S) averaged over heads."""
    with no_autocast(query.device.type):
        scores = _scores(
            query, key, attn_mask, key_mask, alibi_slopes, scale, position_offset, window_left, window_right, softcap
        )
        lse = lse.to(scores.dtype)[..., None]
        weights = (scores - lse.masked_fill(lse == float("-inf"), 0.0)).exp()  # an empty row's scores are all -inf
        weights = philox.dropout(weights, seed, dropout_p, philox.STREAM_ATTENTION)
        return (weights.mean(dim=1) if average_heads else weights).to(query.dtype)


def _scores(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    key_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float,
    position_offset: int | Tensor,
    window_left: int,
    window_right: int,
    softcap: float,
) -> Tensor:
    """(B, H, L, S): -inf where a slot is excluded."""
    compute = torch.promote_types(torch.float32, query.dtype)
    len_q, len_k = query.size(-2), key.size(-2)
    key = _used_slots(key, query, key_mask).to(compute)
    scores = query.to(compute) @ key.transpose(-2, -1) * scale
    if softcap > 0.0:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        positions = query_positions(len_q, position_offset, query.device)
        distance = (positions - torch.arange(len_k, device=query.device)).abs()
        scores = scores - alibi_slopes[:, :, None, None].to(compute) * distance
    for mask in (attn_mask, None if key_mask is None else key_mask[:, :, None, :]):
        if mask is None:
            continue
        if mask.dtype != torch.bool:
            scores = scores + mask.to(compute)
        scores = scores.masked_fill(~takes_part(mask), float("-inf"))
    visible = band(len_q, len_k, position_offset, window_left, window_right, query.device)
    return scores if visible is None else scores.masked_fill(~visible, float("-inf"))


def _softmax(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights (B, H, L, S), 0 in empty rows, and the log-sum-exp (B, H, L), there -inf. A sink joins the sum alone."""
    if sinks is not None:
        sink = sinks[:, :, None, None].to(scores.dtype).expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, sink), dim=-1)
    # A column of -inf changes no sum and makes S = 0 an empty row like any other.
    scores = torch.nn.functional.pad(scores, (0, 1), value=float("-inf"))
    largest = scores.detach().amax(dim=-1, keepdim=True)
    largest = largest.masked_fill(largest == float("-inf"), 0.0)
    weights = (scores - largest).exp()
    total = weights.sum(dim=-1, keepdim=True)
    # Dividing by 0 or taking its logarithm would give empty rows a NaN gradient, even where nothing reads it.
    empty = total == 0.0
    total = total.masked_fill(empty, 1.0)
    lse = (largest + total.log()).masked_fill(empty, float("-inf")).squeeze(-1)
    # Filled although they are 0 already: the gradient sent to an excluded slot may be inf, and 0 times that NaN.
    weights = (weights / total).masked_fill(scores == float("-inf"), 0.0)
    extra = 1 if sinks is None else 2
    return weights[..., : weights.size(-1) - extra], lse


def _used_slots(x: Tensor, query: Tensor, key_mask: Tensor | None) -> Tensor:
    """Key or value as each query head uses it, (B, H, S, .).

    Its heads are repeated over their group; slots that all queries of a head exclude are 0: a NaN there goes nowhere.
    """
    group = query.size(1) // max(x.size(1), 1)
    if group > 1:
        x = x.repeat_interleave(group, dim=1)
    return x if key_mask is None else x.masked_fill(~takes_part(key_mask)[..., None], 0.0)


def workspace(problem: AttentionProblem) -> int:
    """Bytes of the scores and weights that eager attention writes, forward and backward."""
    batch, heads, len_q, _ = problem.query.shape
    itemsize = max(problem.query.element_size(), 4)
    return 4 * batch * heads * len_q * problem.key.size(2) * itemsize

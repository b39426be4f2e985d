"""Attention written out once more, independently of the library: every step in the inputs' own dtype, as a user of plain torch
would. In float64 it is the truth, in the working dtype the error that the contract measures ours against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fusedformer.functional import attention
from fusedformer.kernels.common import philox
from tests.cases import Inputs
from tests.tolerances import assert_within_contract

Results = dict[str, Tensor]
INF = float("inf")
ORDERS = 4


def eager_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    key_mask: Tensor | None = None,
    causal_alignment: str = "top_left",
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    precision: str | None = None,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(out, lse, weights)``; arguments as those of ``fusedformer.functional.attention``."""
    batch, heads, len_q, head_dim = query.shape
    len_k = key.size(2)
    # Query head h of `group` reads key head h // group.
    of_head = torch.arange(heads, device=query.device) // max(heads // max(key.size(1), 1), 1)
    key, value = key[:, of_head], value[:, of_head]

    position = torch.arange(len_q, device=query.device)[:, None]
    if causal_alignment == "bottom_right":
        position = position + len_k - len_q
    slot = torch.arange(len_k, device=query.device)[None, :]
    visible = torch.ones(batch, heads, len_q, len_k, dtype=torch.bool, device=query.device)
    left, right = window or (None, None)
    if is_causal:
        visible = visible & (slot <= position)
    if left is not None and left >= 0:
        visible = visible & (position - slot <= left)
    if right is not None and right >= 0:
        visible = visible & (slot - position <= right)

    scores = torch.einsum("bhle,bhse->bhls", query, key) * (head_dim**-0.5 if scale is None else scale)
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    if alibi_slopes is not None:
        slopes = alibi_slopes[:, :, None, None] if alibi_slopes.dim() == 2 else alibi_slopes[:, None, None]
        scores = scores - slopes * (position - slot).abs()
    for mask in (attn_mask, None if key_mask is None else key_mask[:, None, None, :]):
        if mask is not None and mask.dtype == torch.bool:
            visible = visible & mask
        elif mask is not None:
            visible = visible & (mask > -INF)
            scores = scores + mask
    scores = scores.masked_fill(~visible, -INF)

    slots = scores.size(-1)
    if sinks is not None:
        sink = sinks[:, None, None].to(scores.dtype).expand(batch, heads, len_q, 1)
        scores = torch.cat((scores, sink), dim=-1)
    empty = (scores == -INF).all(dim=-1, keepdim=True)
    scores = scores.masked_fill(empty, 0.0)
    weights = torch.softmax(scores, dim=-1).masked_fill(empty, 0.0)[..., :slots]
    # Over no slot at all torch sums to log 0 = -inf, as for any empty row.
    lse = scores.logsumexp(dim=-1).masked_fill(empty[..., 0], -INF)
    if dropout_p:
        assert seed is not None
        keep = philox.keep_mask(seed, batch * heads, len_q, len_k, dropout_p, 0).view(weights.shape)
        dropped = round(dropout_p * 65536) / 65536
        weights = weights * keep / (1.0 - dropped) if dropped < 1.0 else weights * 0.0
    weights = weights.to(query.dtype)
    return torch.einsum("bhls,bhsv->bhlv", weights, value), lse, weights


def results(function: Callable[..., tuple[Tensor, Tensor]], inputs: Inputs, with_lse: bool = True) -> Results:
    """``out``, ``lse`` and the gradient of every differentiable input, both results sent a gradient back."""
    leaves, named = inputs.leaves()
    out, lse = function(leaves.query, leaves.key, leaves.value, **leaves.options)
    sent = [(out, inputs.grad_out)] + ([(lse, inputs.grad_lse.to(lse.dtype))] if with_lse else [])
    outputs, grads_out = zip(*sent, strict=True)
    grads = torch.autograd.grad(outputs, list(named.values()), grads_out, allow_unused=True, materialize_grads=True)
    found = {f"grad {name}": grad for name, grad in zip(named, grads, strict=True)}
    return {"out": out.detach()} | ({"lse": lse.detach()} if with_lse else {}) | found


def fused(backend: str, **given: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """Our attention with its log-sum-exp, for :func:`results`. SDPA returns none; there a placeholder stands for it."""

    def function(*tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        if backend == "torch":
            out = attention(*tensors, **options, **given, backend=backend)
            return out, out.new_empty(0)
        return attention(*tensors, **options, **given, backend=backend, return_lse=True)

    return function


def eager(*tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return eager_attention(*tensors, **options)[:2]


def expected(inputs: Inputs, with_lse: bool = True) -> tuple[Results, list[Results]]:
    """The float64 truth, and eager torch's results in the inputs' dtype, its sums over features in several orders."""
    truth = results(eager, inputs.to(torch.float64), with_lse)
    attempts = []
    for _ in range(ORDERS):
        orders = {name: torch.randperm(getattr(inputs, name).size(-1)).to(inputs.query.device) for name in ("query", "value")}
        orders |= {"key": orders["query"], "out": orders["value"]}
        shuffled = replace(
            inputs,
            **{name: getattr(inputs, name)[..., orders[name]] for name in ("query", "key", "value")},
            grad_out=inputs.grad_out[..., orders["out"]],
        )
        attempt = results(eager, shuffled, with_lse)
        if with_lse:  # the log-sum-exp is float32 by contract, so float32 is what it is measured against
            single = shuffled.to(torch.promote_types(inputs.query.dtype, torch.float32))
            attempt["lse"] = eager(single.query, single.key, single.value, **single.options)[1]
        for name, order in orders.items():
            result = name if name == "out" else f"grad {name}"
            attempt[result] = attempt[result][..., order.argsort()]
        attempts.append(attempt)
    return truth, attempts


def assert_results_within_contract(actual: Results, inputs: Inputs) -> None:
    truth, attempts = expected(inputs, with_lse="lse" in actual)
    assert actual.keys() == truth.keys()
    for name, x in actual.items():
        assert_within_contract(x, truth[name], [attempt[name] for attempt in attempts], name)

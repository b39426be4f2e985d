"""The feed-forward network written out once more, independently of the library: every step in the inputs' own dtype,
as a user of plain torch would. In float64 it is the truth, in the working dtype the error that ours is held to."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fusedformer.functional import feed_forward
from fusedformer.kernels.common import philox
from tests.kernels.feed_forward.cases import Inputs
from tests.tolerances import assert_within_contract

Results = dict[str, Tensor]
call: Callable[..., Tensor] = feed_forward  # its signature does not take dicts of arguments apart
ATTEMPTS = {torch.float32: 12}  # half precision rounds so often that luck averages out
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "relu2": lambda x: F.relu(x) ** 2,
}


def eager_feed_forward(
    input: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    bias1: Tensor | None = None,
    bias2: Tensor | None = None,
    *,
    activation: str = "relu",
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    residual: Tensor | None = None,
    residual_dropout_p: float = 0.0,
    recompute: bool = False,
    precision: str | None = None,
    seed: Tensor | None = None,
    attempt: int = 0,
) -> Tensor:
    """Arguments as those of ``fusedformer.functional.feed_forward``; ``attempt`` changes the order of every sum."""
    rows = input.reshape(-1, input.size(-1))
    tokens, features, hiddens = (
        _order(size, attempt, input.device) for size in (rows.size(0), rows.size(1), weight1.size(0))
    )
    x = rows[tokens][:, features]

    def first(weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight[hiddens][:, features], None if bias is None else bias[hiddens])

    value, act = first(weight1, bias1), ACTIVATIONS[activation]
    hidden = act(value) if gate_weight is None else act(first(gate_weight, gate_bias)) * value
    if dropout_p > 0.0:
        hidden = _dropout(hidden, seed, dropout_p, 1, tokens, hiddens)
    out = F.linear(hidden, weight2[:, hiddens], bias2)
    if residual is not None:
        if residual_dropout_p > 0.0:
            out = _dropout(out, seed, residual_dropout_p, 2, tokens, torch.arange(out.size(1), device=out.device))
        out = residual.reshape(out.shape)[tokens] + out
    return out[tokens.argsort()].view(*input.shape[:-1], -1)


def _dropout(x: Tensor, seed: Tensor | None, p: float, stream: int, rows: Tensor, columns: Tensor) -> Tensor:
    assert seed is not None
    keep = philox.keep_mask(seed, 1, x.size(0), x.size(1), p, stream)[0, rows][:, columns]
    dropped = round(p * 65536) / 65536
    return x * keep / (1.0 - dropped) if dropped < 1.0 else x * 0.0


def _order(size: int, attempt: int, device: torch.device) -> Tensor:
    return torch.randperm(size).to(device) if attempt else torch.arange(size, device=device)


def results(function: Callable[..., Tensor], inputs: Inputs) -> Results:
    """``out`` and the gradient of every tensor."""
    leaves = inputs.leaves()
    out = function(**leaves.tensors, **leaves.options)
    grads = torch.autograd.grad(out, list(leaves.tensors.values()), inputs.grad_out)
    return {"out": out.detach()} | {f"grad {name}": x for name, x in zip(leaves.tensors, grads, strict=True)}


def fused(backend: str, **given: Any) -> Callable[..., Tensor]:
    """Our network, for :func:`results`."""
    return partial(call, **given, backend=backend)


def expected(inputs: Inputs) -> tuple[Results, list[Results]]:
    """The float64 truth, and several of eager torch's results in the inputs' dtype."""
    truth = results(eager_feed_forward, inputs.to(torch.float64))
    attempts = range(ATTEMPTS.get(inputs.grad_out.dtype, 2))
    return truth, [results(partial(eager_feed_forward, attempt=attempt), inputs) for attempt in attempts]


def assert_results_within_contract(actual: Results, inputs: Inputs) -> None:
    truth, attempts = expected(inputs)
    assert actual.keys() == truth.keys()
    for name, x in actual.items():
        assert_within_contract(x, truth[name], [attempt[name] for attempt in attempts], name)

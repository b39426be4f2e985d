"""The norm ops written out once more, as a user of plain torch would. In float64 it is the truth, in the working dtype
the error that the contract measures ours against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedformer.functional import dropout_add_layer_norm, dropout_add_rms_norm
from fusedformer.kernels.common import philox
from tests.kernels.norm.cases import Inputs
from tests.tolerances import assert_within_contract

Results = dict[str, Tensor]
Both = tuple[Tensor, Tensor]
ATTEMPTS = {torch.float32: 12}  # half precision rounds so often that luck averages out
EPS = {"layer_norm": 1e-5, "rms_norm": 1e-6}


def eager(inputs: Inputs, attempt: int = 0) -> Callable[..., Both]:
    """``(out, sum)``. ``attempt`` changes what mathematics leaves open: the order of every sum, over features and over
    rows, and how dropout scales."""
    features = inputs.tensors["input"].size(-1)
    rows = inputs.tensors["input"].numel() // features
    device = inputs.grad_out.device

    def order(size: int) -> Tensor:
        return torch.randperm(size).to(device) if attempt else torch.arange(size, device=device)

    of_features, of_rows = order(features), order(rows)

    def function(
        input: Tensor, residual: Tensor | None = None, weight: Tensor | None = None, bias: Tensor | None = None
    ) -> Both:
        dropout_p = inputs.options.get("dropout_p", 0.0)
        total = input
        if dropout_p:
            keep = philox.keep_mask(inputs.options["seed"], 1, rows, features, dropout_p, 2).view(input.shape)
            kept = 1.0 - round(dropout_p * 65536) / 65536
            scaled = total / kept if attempt % 2 else total * (1.0 / kept)  # the latter as torch's dropout
            total = scaled * keep
        if residual is not None:
            total = residual + total
        shuffled = total.reshape(rows, features)[of_rows][:, of_features]
        weight, bias = (None if x is None else x[of_features] for x in (weight, bias))
        eps = inputs.options.get("eps", EPS[inputs.norm])
        if any(x is not None and x.dtype != total.dtype for x in (weight, bias)):
            shuffled = shuffled.float()
        if inputs.norm == "layer_norm":
            out = torch.nn.functional.layer_norm(shuffled, (features,), weight, bias, eps)
        else:
            out = torch.nn.functional.rms_norm(shuffled, (features,), weight, eps)
        return out[of_rows.argsort()][:, of_features.argsort()].view(input.shape).to(total.dtype), total

    return function


def fused(inputs: Inputs, backend: str, **given: Any) -> Callable[..., Both]:
    """Ours with its sum, for :func:`results`."""

    def function(
        input: Tensor, residual: Tensor | None = None, weight: Tensor | None = None, bias: Tensor | None = None
    ) -> Both:
        options: dict[str, Any] = {**inputs.options, "return_sum": True, "backend": backend, **given}
        if inputs.norm == "layer_norm":
            return dropout_add_layer_norm(input, residual, weight, bias, **options)  # type: ignore[no-any-return]
        return dropout_add_rms_norm(input, residual, weight, **options)  # type: ignore[no-any-return]

    return function


def results(function: Callable[..., Both], inputs: Inputs) -> Results:
    """``out``, ``sum`` and the gradient of every input, both results sent a gradient back."""
    leaves = inputs.leaves()
    out, total = function(**leaves)
    sent = (inputs.grad_out.to(out.dtype), inputs.grad_sum.to(total.dtype))
    grads = torch.autograd.grad((out, total), list(leaves.values()), sent)
    named = {f"grad {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {"out": out.detach(), "sum": total.detach()} | named


def expected(inputs: Inputs) -> tuple[Results, list[Results]]:
    """The float64 truth, and several of eager torch's results in the inputs' dtype."""
    wide = inputs.to(torch.float64)
    truth = results(eager(wide), wide)
    attempts = ATTEMPTS.get(inputs.tensors["input"].dtype, 2)
    return truth, [results(eager(inputs, attempt), inputs) for attempt in range(attempts)]


def assert_results_within_contract(actual: Results, truth: Results, attempts: list[Results], of: str = "") -> None:
    assert actual.keys() == truth.keys()
    for name, x in actual.items():
        assert x.dtype == attempts[0][name].dtype, name
        assert_within_contract(x, truth[name], [attempt[name] for attempt in attempts], of + name)

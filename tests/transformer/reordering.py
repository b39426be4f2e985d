"""A model with its features in another order: it computes the same numbers, every sum over features in that order."""

from __future__ import annotations

import torch
from torch import Tensor


class Reordering:
    """An order of the features drawn at random; heads stay whole, their features in one order in all of them.

    Every dimension of these sizes is taken for one of features, so no other dimension may have such a size.
    """

    def __init__(self, d_model: int, nhead: int, dim_feedforward: int) -> None:
        size = d_model // nhead
        features = (torch.randperm(nhead)[:, None] * size + torch.randperm(size)).flatten()
        packed = torch.cat([features + part * d_model for part in range(3)])  # query, key and value projections
        self.orders = {d_model: features, 3 * d_model: packed, dim_feedforward: torch.randperm(dim_feedforward)}
        assert len(self.orders) == 3, (d_model, dim_feedforward)

    def of(self, x: Tensor) -> Tensor:
        for dim, size in enumerate(x.shape):
            if size in self.orders:
                x = x.index_select(dim, self.orders[size])
        return x

    def undone(self, x: Tensor) -> Tensor:
        for dim, size in enumerate(x.shape):
            if size in self.orders:
                x = x.index_select(dim, self.orders[size].argsort())
        return x

    def model(self, model: torch.nn.Module) -> None:
        """Puts the parameters and buffers of ``model`` into this order, in place."""
        with torch.no_grad():
            for x in {x.data_ptr(): x for x in model.state_dict().values()}.values():
                x.copy_(self.of(x))

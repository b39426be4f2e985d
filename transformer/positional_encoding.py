"""Section 3.5, positional encoding: sinusoids of geometrically growing wavelengths, or a learned table."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.common.checks import check_input, check_probability, check_tensor, dtype_name

_KEPT = 2**16  # positions; what lies beyond is computed each time, rather than all that comes before it


class PositionalEncoding(torch.nn.Module, ABC):
    """What both encodings share: ``dropout(x + PE)``, as in section 5.4, for tokens at any positions.

    Args:
        d_model: features.
        dropout: probability of dropping an element of the sum, in training.
        batch_first: whether batches are (N, L, d_model) rather than (L, N, d_model).
    """

    def __init__(self, d_model: int, dropout: float = 0.1, batch_first: bool = False) -> None:
        super().__init__()
        if d_model < 1:
            raise ValueError(f"d_model: got {d_model}, expected at least 1")
        check_probability("dropout", dropout)
        self.d_model, self.dropout, self.batch_first = d_model, dropout, batch_first

    def forward(self, x: Tensor, offset: int | Tensor = 0) -> Tensor:
        """The input plus the encoding of its positions, dropped out.

        Args:
            x: (L, N, d_model), (N, L, d_model) with ``batch_first``, or (L, d_model) without a batch.
            offset: the position of the first token: one for all, or int64 (N,), one of each row; or int64 (N, L)
                whatever ``batch_first`` says, the position of each token. A tensor is not read on the host.

        Returns:
            The shape and dtype of ``x``.

        Raises:
            ValueError, TypeError: an argument is not as described; the message names it.
        """
        check_input("x", x)
        if x.dim() not in (2, 3) or x.size(-1) != self.d_model:
            expected = f"3 dimensions, or 2 without a batch, the last of {self.d_model}"
            raise ValueError(f"x: got shape {tuple(x.shape)}, expected {expected}")
        by_row = x.transpose(0, 1) if x.dim() == 3 and not self.batch_first else x
        length, batch = by_row.size(-2), tuple(by_row.shape[:-2])
        if isinstance(offset, Tensor):
            positions = _positions(offset, x, batch, length)
            encoding = self.at(positions, x.dtype)
        else:
            encoding = self.span(offset, length, x.dtype, x.device)
        out = F.dropout(by_row + encoding, self.dropout, self.training)
        return out if by_row is x else out.transpose(0, 1)

    @abstractmethod
    def at(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """The encoding (..., d_model) of int64 positions (...)."""

    @abstractmethod
    def span(self, start: int, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The encoding (length, d_model) of the positions from ``start``."""

    def extra_repr(self) -> str:
        return f"{self.d_model}, dropout={self.dropout}, batch_first={self.batch_first}"


class SinusoidalPositionalEncoding(PositionalEncoding):
    """The paper's positional encoding, added to embeddings of any length.

        PE(pos, 2i) = sin(pos / 10000^(2i / d_model))
        PE(pos, 2i + 1) = cos(pos / 10000^(2i / d_model))

    An odd ``d_model`` ends with a sine. It has no parameters and nothing in ``state_dict``. Numbers are computed in
    float64 and rounded once, to the dtype of the input; a table of them grows with the lengths that come.

    Args:
        d_model: features.
        dropout: probability of dropping an element of the sum, in training.
        batch_first: whether batches are (N, L, d_model) rather than (L, N, d_model).

    Raises:
        ValueError, TypeError: an argument is not as described; the message names it.

    Source: section 3.5 of "Attention Is All You Need" (Vaswani et al., 2017).
    """

    def __init__(self, d_model: int, dropout: float = 0.1, batch_first: bool = False) -> None:
        super().__init__(d_model, dropout, batch_first)
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def at(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        pairs = torch.arange(0, self.d_model, 2, dtype=torch.float64, device=positions.device)
        angles = positions[..., None] * 10000.0 ** (-pairs / self.d_model)
        both = torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)
        return both[..., : self.d_model].to(dtype)

    def span(self, start: int, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        if start < 0:
            raise ValueError(f"offset: got {start}, expected at least 0")
        # While compiling, the length may be symbolic, and what is made is no number.
        if torch.compiler.is_compiling() or start + length > _KEPT:
            return self.at(torch.arange(start, start + length, device=device), dtype)
        table = self._tables.get((device, dtype))
        if table is None or len(table) < start + length:
            with torch.inference_mode(False):
                table = self.at(torch.arange(2 ** (start + length).bit_length(), device=device), dtype)
            if type(table) is Tensor:  # and not one of a mode that computes shapes alone
                self._tables[device, dtype] = table
        return table[start : start + length]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_tables": {}}


class LearnedPositionalEncoding(PositionalEncoding):
    """A learned vector for each position, added to embeddings of at most ``max_length`` tokens.

    Its parameter is ``weight`` (max_length, d_model), initialised as that of ``torch.nn.Embedding``.

    Args:
        max_length: positions, from 0.
        d_model: features.
        dropout: probability of dropping an element of the sum, in training.
        batch_first: whether batches are (N, L, d_model) rather than (L, N, d_model).
        device, dtype: of the parameter.
        padding_idx: a position that gets no gradient where positions are given as a tensor, as in
            ``torch.nn.Embedding``.

    Raises:
        ValueError, TypeError: an argument is not as described; the message names it.

    Source: row (E) of table 3 of "Attention Is All You Need" (Vaswani et al., 2017).
    """

    def __init__(
        self,
        max_length: int,
        d_model: int,
        dropout: float = 0.1,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        padding_idx: int | None = None,
    ) -> None:
        super().__init__(d_model, dropout, batch_first)
        if max_length < 1:
            raise ValueError(f"max_length: got {max_length}, expected at least 1")
        self.padding_idx = padding_idx
        self.weight = torch.nn.Parameter(torch.empty(max_length, d_model, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        torch.nn.init.normal_(self.weight)

    def at(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        return F.embedding(positions, self.weight, self.padding_idx)

    def span(self, start: int, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        if not 0 <= start <= start + length <= len(self.weight):
            raise ValueError(
                f"x: got positions {start} to {start + length - 1}, expected 0 to {len(self.weight) - 1}, "
                "those of the learned table"
            )
        return self.weight[start : start + length]

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, {super().extra_repr()}"


def _positions(offset: Tensor, x: Tensor, batch: tuple[int, ...], length: int) -> Tensor:
    """The position of each token, (N, L), or (L,) without a batch."""
    check_tensor("offset", offset, device=x.device)
    if offset.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"offset: got {dtype_name(offset.dtype)}, expected int64, or an int")
    if tuple(offset.shape) == batch:
        return offset[..., None] + torch.arange(length, device=x.device)
    if tuple(offset.shape) == (*batch, length):
        return offset
    raise ValueError(f"offset: got shape {tuple(offset.shape)}, expected {batch} or {(*batch, length)}")

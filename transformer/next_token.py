"""Which token comes next: the likeliest, one that is drawn, or those of the best beams.

All that lasts from step to step lies on the device and is written in place, and nothing but ``is_done`` and
``sequences`` makes the host wait, so that a step may be captured in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .cache import KVCache

IMPOSSIBLE = -1.0e9  # the score of a beam that is none; finite, so that it can be divided and compared


@dataclass(frozen=True)
class Limits:
    """When a row ends."""

    max_new_tokens: int
    min_new_tokens: int
    eos: Tensor  # int64 (any number of ids,)
    pad: int

    def ends(self, tokens: Tensor) -> Tensor:
        """Bool, in the shape of ``tokens``: which of them end a row."""
        return (tokens.unsqueeze(-1) == self.eos).any(-1)

    def forbid_early_end(self, scores: Tensor, step: Tensor) -> None:
        """Writes -inf to the scores (rows, V) of ending tokens as long as there are too few."""
        if self.min_new_tokens:
            ends = scores.index_select(1, self.eos).masked_fill_(step < self.min_new_tokens, -torch.inf)
            scores.index_copy_(1, self.eos, ends)


@dataclass(frozen=True)
class Sampling:
    """A draw from the filtered distribution."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    generator: torch.Generator | None = None

    def filtered(self, scores: Tensor) -> Tensor:
        """Scores (rows, V) with -inf for tokens that must not be drawn.

        The ``top_k`` highest stay, and of these the fewest whose probabilities add up to ``top_p``.

        Source: Fan et al., 2018, section 5.4; "The Curious Case of Neural Text Degeneration" (Holtzman et al., 2020),
        section 3.1.
        """
        scores = scores / self.temperature
        if self.top_k is not None:
            least = scores.topk(min(self.top_k, scores.size(1))).values[:, -1:]
            scores = scores.masked_fill(scores < least, -torch.inf)
        if self.top_p is not None and self.top_p < 1.0:
            ascending, order = scores.sort()
            left_out = ascending.softmax(-1).cumsum(-1) <= 1.0 - self.top_p
            left_out[:, -1] = False
            scores = scores.masked_fill(left_out.scatter(1, order, left_out), -torch.inf)
        return scores

    def draw(self, scores: Tensor) -> Tensor:
        """Int64 (rows,), drawn as ``torch.multinomial`` does, but without making the host wait to check the input."""
        scores = scores.to(torch.promote_types(torch.float32, scores.dtype))
        noise = torch.empty_like(scores).exponential_(generator=self.generator)
        return (self.filtered(scores).softmax(-1) / noise).argmax(-1)


class Continuation:
    """One continuation of each row: the likeliest token at each step, or one drawn."""

    def __init__(self, cache: KVCache, limits: Limits, sampling: Sampling | None = None) -> None:
        self.limits, self.sampling = limits, sampling
        rows, device = len(cache.lengths), cache.lengths.device
        self.tokens = torch.empty(rows, 1, dtype=torch.int64, device=device)  # the last of each row
        self._sequences = torch.full((rows, limits.max_new_tokens), limits.pad, device=device)
        self._ended = torch.zeros(rows, dtype=torch.bool, device=device)
        self._step = torch.zeros(1, dtype=torch.int64, device=device)
        self._lengths = torch.zeros(rows, dtype=torch.int64, device=device)  # the end included

    def choose(self, logits: Tensor) -> None:
        """Takes the next token of each row from its logits (rows, V)."""
        self.limits.forbid_early_end(logits, self._step)
        chosen = logits.argmax(-1) if self.sampling is None else self.sampling.draw(logits)
        chosen.masked_fill_(self._ended, self.limits.pad)
        self._sequences.index_copy_(1, self._step, chosen[:, None])
        self._lengths += ~self._ended
        self._step += 1
        self._ended |= self.limits.ends(chosen)
        self.tokens.copy_(chosen[:, None])

    def is_done(self) -> bool:
        """Whether every row has ended: the host waits for the device."""
        return bool(self._ended.all())

    def sequences(self) -> Tensor:
        """Int64 (rows, length), padded behind each row's end."""
        return self._sequences[:, : int(self._lengths.max())]


class Beams:
    """Beam search: the continuations of each row that score best, ``width`` that go on and ``width`` that have ended.

    One of n tokens, the ending one included, scores log p / n^length_penalty once it has ended.

    Source: section 6.1 of "Attention Is All You Need" (Vaswani et al., 2017) and section 7 of "Google's Neural Machine
    Translation System" (Wu et al., 2016); the power of the length, which continuations compete and when a row is given
    up are those of Hugging Face transformers.
    """

    def __init__(
        self,
        cache: KVCache,
        width: int,
        limits: Limits,
        length_penalty: float = 1.0,
        early_stopping: bool | str = False,
        returned: int = 1,
    ) -> None:
        self.limits, self.cache, self.early_stopping, self.returned = limits, cache, early_stopping, returned
        rows, device = len(cache.lengths) // width, cache.lengths.device
        self.tokens = torch.empty(rows * width, 1, dtype=torch.int64, device=device)  # the last of each beam
        longest, dtype = limits.max_new_tokens, torch.promote_types(torch.float32, cache.keys[0].dtype)
        self._penalties = torch.arange(1, longest + 1, device=device).double().pow(length_penalty).to(dtype)
        self._foresees_length = early_stopping == "never" and length_penalty > 0.0
        self._first_rows = width * torch.arange(rows, device=device)[:, None]
        self._step = torch.zeros(1, dtype=torch.int64, device=device)
        self._running = torch.full((rows, width, longest), limits.pad, device=device)
        # At first all beams of a row are the same: one of them is as good as all.
        self._running_scores = torch.full((rows, width), IMPOSSIBLE, dtype=dtype, device=device)
        self._running_scores[:, 0] = 0.0
        self._ended = self._running.clone()
        self._ended_scores = torch.full((rows, width), IMPOSSIBLE, dtype=dtype, device=device)
        self._ended_lengths = torch.zeros((rows, width), dtype=torch.int64, device=device)
        self._open = torch.ones((rows, 1), dtype=torch.bool, device=device)  # what has ended may still be beaten

    def choose(self, logits: Tensor) -> None:
        """Takes the next token of each beam from its logits (rows * width, V), and puts the cache into their order."""
        rows, width = self._running_scores.shape
        scores = logits.to(self._running_scores.dtype).log_softmax(-1)
        self.limits.forbid_early_end(scores, self._step)
        scores = scores.unflatten(0, (rows, width)) + self._running_scores[:, :, None]
        # So many that ``width`` of them go on, however many end.
        count = max(2, 1 + len(self.limits.eos)) * width
        scores, index = scores.flatten(1).topk(count)
        parent, token = index // logits.size(1), index % logits.size(1)
        sequences = _rows_of(self._running, parent).index_copy_(2, self._step, token[:, :, None])
        ends = self.limits.ends(token) | (self._step == self.limits.max_new_tokens - 1)
        self._collect(scores[:, :width], sequences[:, :width], ends[:, :width])

        scores, going_on = torch.where(ends, scores + IMPOSSIBLE, scores).topk(width)
        self._running.copy_(_rows_of(sequences, going_on))
        self._running_scores.copy_(scores)
        self.tokens.copy_(token.gather(1, going_on).view(-1, 1))
        self.cache.reorder((parent.gather(1, going_on) + self._first_rows).flatten())
        self._close()
        self._step += 1

    def _collect(self, scores: Tensor, sequences: Tensor, ends: Tensor) -> None:
        """Has those of the best continuations that end compete with what has ended before."""
        ends = ends & self._open
        scores = torch.where(ends, scores / self._penalties.index_select(0, self._step), IMPOSSIBLE)
        lengths = torch.where(ends, self._step + 1, 0)
        scores, kept = torch.cat([self._ended_scores, scores], 1).topk(scores.size(1))
        self._ended_scores.copy_(scores)
        self._ended_lengths.copy_(torch.cat([self._ended_lengths, lengths], 1).gather(1, kept))
        self._ended.copy_(_rows_of(torch.cat([self._ended, sequences], 1), kept))

    def _close(self) -> None:
        """Gives up the rows whose best running beam cannot beat the worst that has ended."""
        penalty = self._penalties[-1:] if self._foresees_length else self._penalties.index_select(0, self._step)
        has_all = self._ended_lengths.all(1, keepdim=True)
        worst = torch.where(has_all, self._ended_scores[:, -1:], IMPOSSIBLE)
        self._open &= self._running_scores[:, :1] / penalty > worst
        if self.early_stopping is True:
            self._open &= ~has_all

    def is_done(self) -> bool:
        """Whether every row has been given up: the host waits for the device."""
        return not self._open.any()

    def sequences(self) -> Tensor:
        """Int64 (rows * returned, length), the best of each row first, padded behind the end."""
        longest = int(self._ended_lengths[:, : self.returned].max())
        return self._ended[:, : self.returned, :longest].flatten(0, 1)


def _rows_of(x: Tensor, index: Tensor) -> Tensor:
    """``x[b, index[b, i]]`` for all b and i."""
    return x.gather(1, index[:, :, None].expand(-1, -1, x.size(2)))

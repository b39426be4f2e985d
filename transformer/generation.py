"""Generation: from the start of a sequence to its end, greedily, by beam search or by sampling.

A step decodes one token of each row over a :class:`~fusedformer.transformer.cache.KVCache` and chooses the next
(``next_token.py``); the host only asks now and then whether every row has ended.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from ..kernels.common.checks import check_number, check_tensor, dtype_name
from .cache import KVCache
from .next_token import Beams, Continuation, Limits, Sampling

PAGE = 4  # slots of a page where beams share them and the caller names no size: few, as a step copies one for each beam
# Steps between two questions whether all rows have ended: where the answer is to be waited for it is asked less often.
# What is chosen after the end changes nothing.
STEPS_BETWEEN = {"cpu": 1}
STEPS_BETWEEN_ELSEWHERE = 8


class GenerativeModel(Protocol):
    """What :class:`GenerationMixin` is mixed into; a model that reads a source has ``start`` too."""

    config: Any

    def modules(self) -> Iterator[torch.nn.Module]: ...

    def new_cache(self, batch: int, capacity: int, *, page: int | None = None) -> KVCache: ...

    def decode(self, tokens: Tensor, cache: KVCache, count: Tensor | None = None) -> Tensor: ...


class GenerationMixin:
    """Gives a model that decodes over a :class:`~fusedformer.transformer.cache.KVCache` the method ``generate``."""

    @torch.no_grad()  # not inference mode, whose tokens no training could be fed
    def generate(
        self: GenerativeModel,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int,
        min_new_tokens: int = 0,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        early_stopping: bool | str = False,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        num_return_sequences: int = 1,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        generator: torch.Generator | None = None,
        page: int | None = None,
    ) -> Tensor:
        """Continues each prompt, or writes a target for each source, token by token until one that ends it.

        Greedy unless ``num_beams`` or ``do_sample`` say otherwise. No gradients are recorded, and nothing is dropped
        out: modules in training mode are in evaluation mode meanwhile.

        Args:
            input_ids: int64 (B, S): prompts of a causal model, sources of a sequence-to-sequence model.
            attention_mask: (B, S), bool or int; nonzero takes part. A prompt may be padded on either side: what takes
                part is read as if it stood alone. None: all of a source, and of a prompt all but ``pad_token_id``
                unless that also ends sequences.
            max_new_tokens: after so many a row ends whatever comes.
            min_new_tokens: before so many no token ends a row.
            num_beams: width of the beam search; 1: none.
            length_penalty: of beam search, the exponent of the length by which log-probabilities are divided; positive
                values favour long sequences.
            early_stopping: of beam search: True ends a row once ``num_beams`` have ended; False once the best running
                beam, were it to end now, would not beat the worst of them; "never" once no running beam can.
            do_sample: draw each token, from the distribution that the next three leave.
            temperature: divides the logits.
            top_k: only the so many likeliest tokens; None: all.
            top_p: of these only the fewest likeliest whose probabilities add up to so much; None: all.
            num_return_sequences: for each row, of its beams or, with ``do_sample``, drawn.
            eos_token_id: one or several that end a row; none if empty; None: the config's.
            pad_token_id: fills rows that have ended; None: the config's, or else the first of ``eos_token_id``.
            generator: to draw with; None: torch's.
            page: slots of a page of the cache; None: beams share pages of 4, without beams the cache is in one piece.

        Returns:
            Int64 (B * num_return_sequences, length): a causal model's prompts as they were given, or the config's
            ``decoder_start_token_id``, and the new tokens.

        Raises:
            ValueError, TypeError: an argument is not as described, has no effect beside the others, or asks for more
                tokens than the model has positions for; the message names it.
        """
        for name, count, least in (
            ("max_new_tokens", max_new_tokens, 1),
            ("min_new_tokens", min_new_tokens, 0),
            ("num_beams", num_beams, 1),
            ("num_return_sequences", num_return_sequences, 1),
        ):
            _check_count(name, count, least)
        if min_new_tokens > max_new_tokens:
            raise ValueError(
                f"min_new_tokens: got {min_new_tokens}, expected at most max_new_tokens = {max_new_tokens}"
            )
        _check_beams(num_beams, length_penalty, early_stopping, do_sample)
        _check_sampling(do_sample, temperature, top_k, top_p, generator)
        if num_return_sequences > num_beams and not do_sample:
            expected = f"at most num_beams = {num_beams}, or do_sample=True"
            raise ValueError(f"num_return_sequences: got {num_return_sequences}, expected {expected}")
        config = self.config
        eos = _tokens("eos_token_id", config.eos_token_id if eos_token_id is None else eos_token_id, config)
        pad = _tokens("pad_token_id", config.pad_token_id if pad_token_id is None else pad_token_id, config)
        if num_beams > 1 and len(eos) >= config.vocab_size:
            raise ValueError(f"eos_token_id: got {eos}, expected to leave beams a token to go on with")
        start = getattr(self, "start", None)  # of a model that reads a source
        padding = pad[0] if start is None and pad and pad[0] not in eos else None
        takes_part, longest = _check_input(input_ids, attention_mask, padding, config.vocab_size)
        if start is None:
            _check_length(config, longest, max_new_tokens)
        else:
            _check_length(config, 1, max_new_tokens, input_ids.size(1))

        device, copies = input_ids.device, max(num_beams, num_return_sequences)
        limits = Limits(
            max_new_tokens, min_new_tokens, torch.tensor(eos, dtype=torch.int64, device=device), (*pad, *eos, 0)[0]
        )
        if page is None and num_beams > 1:
            page = PAGE
        with _evaluating(self):
            if start is not None:
                given = input_ids.new_full((len(input_ids), 1), config.decoder_start_token_id)
                cache = start(input_ids, takes_part, max_new_tokens, page=page)
                logits = self.decode(given, cache)
            else:
                given = input_ids
                cache = self.new_cache(len(input_ids), longest + max_new_tokens - 1, page=page)
                tokens, counts = _padded_right(input_ids, takes_part, longest)
                logits = self.decode(tokens, cache, counts)
            cache.repeat(copies)
            choice: Beams | Continuation
            if num_beams > 1:
                choice = Beams(cache, num_beams, limits, length_penalty, early_stopping, num_return_sequences)
            else:
                sampling = Sampling(temperature, top_k, top_p, generator) if do_sample else None
                choice = Continuation(cache, limits, sampling)
            choice.choose(logits.repeat_interleave(copies, 0))
            between = STEPS_BETWEEN.get(device.type, STEPS_BETWEEN_ELSEWHERE)
            for step in range(1, max_new_tokens):
                if step % between == 0 and choice.is_done():
                    break
                choice.choose(self.decode(choice.tokens, cache))
        return torch.cat([given.repeat_interleave(num_return_sequences, 0), choice.sequences()], 1)


@contextmanager
def _evaluating(model: GenerativeModel) -> Iterator[None]:
    """Within the block nothing is dropped out."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _padded_right(input_ids: Tensor, takes_part: Tensor | None, longest: int) -> tuple[Tensor, Tensor | None]:
    """What takes part of each row, from its left, (B, longest), and how many that are, (B,), or None: all."""
    if takes_part is None:
        return input_ids, None
    order = (~takes_part).to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]
    return input_ids.gather(1, order), takes_part.sum(1)


def _tokens(name: str, given: object, config: Any) -> tuple[int, ...]:
    """The token or tokens that were given, maybe none; raises unless they are of the vocabulary."""
    ids = () if given is None else tuple(given) if isinstance(given, Sequence) else (given,)
    for token in ids:
        _check_count(name, token, 0)
        if token >= config.vocab_size:
            raise ValueError(f"{name}: got {token}, expected a token of [0, {config.vocab_size})")
    return tuple(dict.fromkeys(ids))


def _check_count(name: str, count: object, least: int) -> None:
    if not isinstance(count, int) or isinstance(count, bool):
        raise TypeError(f"{name}: got {type(count).__name__}, expected an int")
    if count < least:
        raise ValueError(f"{name}: got {count}, expected at least {least}")


def _check_beams(num_beams: int, length_penalty: float, early_stopping: bool | str, do_sample: bool) -> None:
    check_number("length_penalty", length_penalty)
    if early_stopping not in (True, False, "never"):
        raise ValueError(f'early_stopping: got {early_stopping!r}, expected True, False or "never"')
    if num_beams > 1 and do_sample:
        raise ValueError(
            f"do_sample: got True with num_beams = {num_beams}, expected one of the two: beams are not drawn"
        )
    for name, value, default in (
        ("length_penalty", length_penalty, 1.0),
        ("early_stopping", early_stopping, False),
    ):
        if num_beams == 1 and value != default:
            raise ValueError(f"{name}: got {value} without beams, expected num_beams of at least 2: it has no effect")


def _check_sampling(
    do_sample: bool, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> None:
    check_number("temperature", temperature)
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature: got {temperature}, expected a positive number; do_sample=False is greedy")
    if top_k is not None:
        _check_count("top_k", top_k, 1)
    if top_p is not None:
        check_number("top_p", top_p)
        if not 0.0 < top_p <= 1.0:
            raise ValueError(f"top_p: got {top_p}, expected a probability above 0")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: got {type(generator).__name__}, expected a torch.Generator")
    for name, value, default in (
        ("temperature", temperature, 1.0),
        ("top_k", top_k, None),
        ("top_p", top_p, None),
        ("generator", generator, None),
    ):
        if not do_sample and value != default:
            raise ValueError(f"{name}: got {value} without do_sample=True, expected it with that: it has no effect")


def _check_input(
    input_ids: Tensor, attention_mask: Tensor | None, padding: int | None, vocab_size: int
) -> tuple[Tensor | None, int]:
    """Which tokens take part, bool (B, S) or None where all do, and how many at most in a row."""
    check_tensor("input_ids", input_ids)
    if input_ids.dtype != torch.int64:
        raise TypeError(f"input_ids: got {dtype_name(input_ids.dtype)}, expected int64")
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ValueError(f"input_ids: got shape {tuple(input_ids.shape)}, expected (batch, length) without a 0")
    if attention_mask is None:
        takes_part = torch.ones_like(input_ids, dtype=torch.bool) if padding is None else input_ids != padding
    else:
        check_tensor("attention_mask", attention_mask, device=input_ids.device)
        if attention_mask.is_floating_point() or attention_mask.is_complex():
            got = dtype_name(attention_mask.dtype)
            raise TypeError(f"attention_mask: got {got}, expected bool or an integer type, nonzero taking part")
        if attention_mask.shape != input_ids.shape:
            expected = f"{tuple(input_ids.shape)}, as input_ids"
            raise ValueError(f"attention_mask: got shape {tuple(attention_mask.shape)}, expected {expected}")
        takes_part = attention_mask != 0
    lengths = takes_part.sum(1)
    numbers = torch.stack([*lengths.aminmax(), *input_ids.aminmax()])
    shortest, longest, lowest, highest = numbers.tolist()  # the host waits for the device this once
    if shortest == 0:
        what = "input_ids" if attention_mask is None else "attention_mask"
        row = lengths.tolist().index(0)
        raise ValueError(
            f"{what}: got row {row} with nothing but padding, expected a token that takes part in every row"
        )
    if lowest < 0 or highest >= vocab_size:
        raise ValueError(f"input_ids: got tokens from {lowest} to {highest}, expected tokens of [0, {vocab_size})")
    return (None if shortest == input_ids.size(1) else takes_part), longest


def _check_length(config: Any, given: int, max_new_tokens: int, source: int = 0) -> None:
    limit = getattr(config, "max_length", None)
    if limit is None:
        return
    if given + max_new_tokens > limit:
        raise ValueError(
            f"max_new_tokens: got {max_new_tokens} behind {given} tokens, expected at most {limit} together, "
            "the model's max_length"
        )
    if source > limit:
        raise ValueError(f"input_ids: got {source} tokens, expected at most {limit}, the model's max_length")

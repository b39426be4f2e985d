"""What a masked language model is trained on: some tokens hidden, to be predicted."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.common.checks import check_probability, check_tensor, dtype_name
from .checks import check_like_tokens, check_size, check_token

IGNORED = -100  # cross_entropy's default for labels that do not count


def mask_tokens(
    input_ids: Tensor,
    mask_token_id: int,
    vocab_size: int,
    probability: float = 0.15,
    special_tokens_mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Chooses tokens to predict; of those 80% become the mask token, 10% a random token, and 10% stay.

    Args:
        input_ids: int64, any shape; not changed.
        mask_token_id: the token that hides others.
        vocab_size: random tokens are drawn from [0, vocab_size).
        probability: of each token to be chosen.
        special_tokens_mask: integers or bool in the shape of ``input_ids``; where nonzero, as for padding, a token is
            never chosen. A Hugging Face tokenizer returns it for ``return_special_tokens_mask=True``.
        generator: on the device of ``input_ids``; None: torch's default.

    Returns:
        ``(masked, labels)``, both int64 in the shape of ``input_ids``: what the model sees, and the chosen tokens, -100
        elsewhere.

    Raises:
        ValueError, TypeError: an argument is not as described; the message names it.

    Source: section 3.1, "Masked LM", of "BERT: Pre-training of Deep Bidirectional Transformers" (Devlin et al., 2019).
    """
    check_tensor("input_ids", input_ids)
    if input_ids.dtype != torch.int64:
        raise TypeError(f"input_ids: got {dtype_name(input_ids.dtype)}, expected int64")
    check_size("vocab_size", vocab_size)
    check_token("mask_token_id", mask_token_id, vocab_size)
    check_probability("probability", probability)
    draw = torch.rand(input_ids.shape, generator=generator, device=input_ids.device)
    chosen = draw < probability
    if special_tokens_mask is not None:
        check_like_tokens("special_tokens_mask", special_tokens_mask, input_ids)
        chosen &= special_tokens_mask == 0
    # Of what is chosen the draw is uniform below the probability, so it also says which of the three it becomes.
    random = torch.randint(vocab_size, input_ids.shape, generator=generator, device=input_ids.device)
    masked = input_ids.where(~chosen | (draw >= 0.9 * probability), random)
    masked = masked.masked_fill(chosen & (draw < 0.8 * probability), mask_token_id)
    return masked, input_ids.masked_fill(~chosen, IGNORED)

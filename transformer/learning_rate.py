"""The learning rate of section 5.3: linear warm-up, then the inverse square root of the step."""

from __future__ import annotations

from collections.abc import Callable


def warmup_schedule(d_model: int, warmup_steps: int = 4000) -> Callable[[int], float]:
    """The paper's learning rate, for ``torch.optim.lr_scheduler.LambdaLR`` over an optimizer of ``lr=1.0``.

        lrate = d_model^-0.5 · min(step^-0.5, step · warmup_steps^-1.5)

    The paper's optimizer is ``torch.optim.Adam(parameters, lr=1.0, betas=(0.9, 0.98), eps=1e-9)``.

    Args:
        d_model: the model's features.
        warmup_steps: at which the rate is highest, (d_model · warmup_steps)^-0.5.

    Returns:
        The rate of the n-th update, n counting from 0 as ``LambdaLR`` does: the paper's step is n + 1.

    Raises:
        ValueError: an argument is not positive.

    Source: equation (3) of "Attention Is All You Need" (Vaswani et al., 2017).
    """
    for name, value in (("d_model", d_model), ("warmup_steps", warmup_steps)):
        if value <= 0:
            raise ValueError(f"{name}: got {value}, expected a positive number")
    return lambda n: d_model**-0.5 * min((n + 1) ** -0.5, (n + 1) * warmup_steps**-1.5)

"""Which kernels a stored GPU run has shown to pass on which architecture."""

from __future__ import annotations

# (operation, backend, architecture): the results file, under benchmarks/results/, of a run of the GPU lane that passed.
VERIFIED: dict[tuple[str, str, str], str] = {}


def notes(operation: str, backend: str, architecture: str) -> list[str]:
    """One remark if no results file shows this kernel to have passed on this architecture; empty otherwise."""
    if (operation, backend, architecture) in VERIFIED:
        return []
    return [f"not verified on this architecture ({architecture})"]

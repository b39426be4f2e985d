"""Makes the interpreter round a product as a GPU does: the same in every tile that computes it; runs a test on the
instruction set level that it is marked with; and notes what is launched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fusedformer.kernels.common import native
from fusedformer.kernels.common.device import TRITON_INSTALLED, TRITON_INTERPRETED


@pytest.fixture(autouse=True)
def _products_do_not_depend_on_the_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """BLAS sums in an order that depends on a product's shape, so backward's scores would not be forward's: in fp32 the
    error of a peaked row would be BLAS's. Products summed in float64 and rounded once have no order."""
    if not (TRITON_INSTALLED and TRITON_INTERPRETED):
        return
    import numpy
    from triton.runtime import interpreter

    def create_dot(self: Any, a: Any, b: Any, acc: Any, *_: Any) -> Any:
        products = numpy.matmul(a.data, b.data, dtype=numpy.float64).astype(acc.data.dtype)
        return interpreter.TensorHandle(products + acc.data, acc.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)

    # numpy adds rows up one after the other, where a GPU's tree is as accurate as torch's sum.
    def total(self: Any, input: Any) -> Any:
        x = input.handle.data
        wide = numpy.float64 if numpy.issubdtype(x.dtype, numpy.floating) else x.dtype
        result = numpy.sum(x, axis=self.axis, keepdims=self.keep_dims, dtype=wide)
        return self.to_tensor(result.astype(x.dtype), input.dtype)

    monkeypatch.setattr(interpreter.ReduceOps, "sum", total)


@pytest.fixture(autouse=True)
def _level(request: pytest.FixtureRequest) -> Iterator[None]:
    mark = request.node.get_closest_marker("level")
    if mark is None:
        yield
        return
    with native.use_level(*mark.args):
        yield


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every step of ``common/triton_launch.py`` that runs, in order."""
    from fusedformer.kernels.common.triton_launch import Launch, LibraryProduct

    steps: list[Launch | LibraryProduct] = []
    for kind in (Launch, LibraryProduct):

        def run(step: Any, device: torch.device, original: Any = kind.run) -> None:
            steps.append(step)
            original(step, device)

        monkeypatch.setattr(kind, "run", run)
    return steps

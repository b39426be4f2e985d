"""The standard transformer in fused kernels, as a drop-in for ``torch.nn``."""

from fusedformer import functional
from fusedformer.kernels.common.backend import BackendRefused, Explanation, use_backend

__version__ = "0.1.0"
__all__ = ["BackendRefused", "Explanation", "functional", "use_backend"]

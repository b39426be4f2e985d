"""The standard transformer in fused kernels, as a drop-in for ``torch.nn``."""

from fusedformer import functional, nn
from fusedformer.kernels.common.backend import BackendRefused, Explanation, use_backend
from fusedformer.kernels.common.explain import Backends, backends, explain
from fusedformer.transformer.conversion import Report, fuse, unfuse

__version__ = "0.1.0"
__all__ = [
    "BackendRefused",
    "Backends",
    "Explanation",
    "Report",
    "backends",
    "explain",
    "functional",
    "fuse",
    "nn",
    "unfuse",
    "use_backend",
]

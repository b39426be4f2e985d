"""Drop-in for ``torch.nn.functional``: fused where fusedformer has a kernel, torch's own for every other name."""

from typing import Any

from torch.nn import functional as _torch_functional

from fusedformer.kernels.attention.api import attention, attention_weights, scaled_dot_product_attention
from fusedformer.kernels.attention.kvcache import attention_with_kvcache
from fusedformer.kernels.feed_forward.api import feed_forward
from fusedformer.kernels.linear.api import linear
from fusedformer.kernels.norm.api import dropout_add_layer_norm, dropout_add_rms_norm

__all__ = [
    "attention",
    "attention_weights",
    "attention_with_kvcache",
    "dropout_add_layer_norm",
    "dropout_add_rms_norm",
    "feed_forward",
    "linear",
    "scaled_dot_product_attention",
]


def __getattr__(name: str) -> Any:
    return getattr(_torch_functional, name)


def __dir__() -> list[str]:
    return sorted({*__all__, *dir(_torch_functional)})

"""The functional ops. Each has the signature and the meaning of its twin in `p3d_kernels.reference`."""

from .._norm import Norm
from ..reference import bn_relu, max_pool, stem
from .bottleneck import bottleneck
from .conv import pointwise_conv, spatial_conv, temporal_conv
from .pseudo3d import pseudo3d_conv

__all__ = [
    "Norm",
    "bn_relu",
    "bottleneck",
    "max_pool",
    "pointwise_conv",
    "pseudo3d_conv",
    "spatial_conv",
    "stem",
    "temporal_conv",
]

"""The functional ops. Each has the signature and the meaning of its twin in `p3d_kernels.reference`."""

from .._norm import Norm
from .bn_relu import bn_relu
from .bottleneck import bottleneck
from .conv import pointwise_conv, spatial_conv, temporal_conv
from .max_pool import max_pool
from .pseudo3d import pseudo3d_conv
from .stem import stem

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

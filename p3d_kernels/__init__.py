"""P3D Kernels: fused Triton and CUDA kernels for factorised (pseudo-3-D) video networks.

Importing this package needs neither a GPU, nor Triton, nor the compiled extension; `python -m p3d_kernels info` says
what is there and why the rest is missing.
"""

from . import ops
from ._backends import use_backend
from ._norm import Norm

__version__ = "0.1.0"

__all__ = [
    "Norm",
    "ops",
    "use_backend",
]

"""P3D Kernels: fused Triton and CUDA kernels for factorised (pseudo-3-D) video networks.

Importing this package needs neither a GPU, nor Triton, nor the compiled extension; `python -m p3d_kernels info` says
what is there and why the rest is missing.
"""

from . import models, nn, ops
from ._backends import use_backend
from ._norm import Norm
from .accelerate import AccelerateReport, accelerate
from .checkpoints import LoadReport, load_checkpoint
from .engine import Engine
from .freeze import freeze, load_engine
from .models import P3D, p3d63, p3d131, p3d199

__version__ = "0.1.0"

__all__ = [
    "AccelerateReport",
    "Engine",
    "LoadReport",
    "Norm",
    "P3D",
    "accelerate",
    "freeze",
    "load_checkpoint",
    "load_engine",
    "models",
    "nn",
    "ops",
    "p3d63",
    "p3d131",
    "p3d199",
    "use_backend",
]

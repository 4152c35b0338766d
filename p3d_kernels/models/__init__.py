"""P3D ResNets, their plain PyTorch twin, and what they read."""

from ._common import DEPTHS, InputSpec, frozen_bn, input_spec, normalise
from .p3d import P3D, p3d63, p3d131, p3d199
from .plain import PlainP3D

__all__ = [
    "DEPTHS",
    "InputSpec",
    "P3D",
    "PlainP3D",
    "frozen_bn",
    "input_spec",
    "normalise",
    "p3d131",
    "p3d199",
    "p3d63",
]

"""The Hopper kernels as functions of tensors: checks, buffers and launch plans around `p3d_kernels._C`.

A tensor's "affine" is float32 [3, C], rows mean, scale and bias: u = (z - mean) * scale + bias. Activations are
[N, C, T, H, W] in channels_last_3d memory, bfloat16 or float16; everything is 16-byte aligned.
"""

from .bn_bwd import bn_bwd, bn_bwd_why_not
from .conv_infer import conv_infer, conv_infer_why_not
from .conv_train import conv_pair, conv_pair_why_not, conv_tiles_why_not, conv_train, conv_train_why_not
from .conv_wgrad import conv_wgrad, conv_wgrad_why_not
from .gram import gram_add, gram_bwd, gram_bwd_why_not, gram_dgrad, gram_raw, gram_raw_why_not, gram_tiles_why_not
from .point_dgrad import point_dgrad, point_dgrad_why_not
from .raw_wgrad import RAW_WGRADS, RawWgrad, raw_wgrad_why_not, raw_wgrads
from .reduce_bwd import reduce_bwd, reduce_bwd_why_not
from .spatial import spatial_conv_dgrad, spatial_conv_fwd, spatial_wgrad, wgrad_why_not, why_not
from .stem import (
    STEM_COUTS,
    stem_fwd,
    stem_fwd_why_not,
    stem_infer,
    stem_pack,
    stem_relu,
    stem_wgrad,
    stem_wgrad_why_not,
    stem_why_not,
)
from .tail import tail_infer, tail_why_not
from .temporal import (
    temporal_bwd,
    temporal_bwd_why_not,
    temporal_infer,
    temporal_train,
    temporal_train_why_not,
    temporal_why_not,
)

__all__ = [
    "RAW_WGRADS",
    "RawWgrad",
    "STEM_COUTS",
    "bn_bwd",
    "bn_bwd_why_not",
    "conv_infer",
    "conv_infer_why_not",
    "conv_pair",
    "conv_pair_why_not",
    "conv_tiles_why_not",
    "conv_train",
    "conv_train_why_not",
    "conv_wgrad",
    "conv_wgrad_why_not",
    "gram_add",
    "gram_bwd",
    "gram_bwd_why_not",
    "gram_dgrad",
    "gram_raw",
    "gram_raw_why_not",
    "gram_tiles_why_not",
    "point_dgrad",
    "point_dgrad_why_not",
    "raw_wgrad_why_not",
    "raw_wgrads",
    "reduce_bwd",
    "reduce_bwd_why_not",
    "spatial_conv_dgrad",
    "spatial_conv_fwd",
    "spatial_wgrad",
    "stem_fwd",
    "stem_fwd_why_not",
    "stem_infer",
    "stem_pack",
    "stem_relu",
    "stem_wgrad",
    "stem_wgrad_why_not",
    "stem_why_not",
    "tail_infer",
    "tail_why_not",
    "temporal_bwd",
    "temporal_bwd_why_not",
    "temporal_infer",
    "temporal_train",
    "temporal_train_why_not",
    "temporal_why_not",
    "wgrad_why_not",
    "why_not",
]

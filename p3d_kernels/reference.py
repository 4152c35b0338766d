"""The definition of every op in plain PyTorch: any device, any dtype, differentiable by autograd.

The other backends are judged against these functions in float64. They are the `aten` backend as well.

Activations are [N, C, T, H, W]. A convolution has no bias and "same" padding (1 for a tap axis of 3). `Norm` is one
batch normalisation (see `_norm.py`). A P3D block joins a spatial convolution S (1x3x3) and a temporal convolution T
(3x1x1), each followed by batch normalisation (Qiu, Yao, Mei: Learning Spatio-Temporal Representation with Pseudo-3D
Residual Networks, ICCV 2017, section 3.1). Two networks carry the name P3D; with s = bn_s(S x):

    kind   wiring="author" (released Caffe graphs)           wiring="port" (PyTorch port)
    A      relu(bn_t(T relu(s)))                             the same
    B      relu(relu(s) + bn_t(T x))                         relu(s) + relu(bn_t(T x))
    C      relu(0.5 relu(s) + 0.5 bn_t(T relu(s)))           relu(s) + relu(bn_t(T relu(s)))
    2d     relu(s)                                           the same; no T (stage 4)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._norm import Norm, remember, update_running

KINDS = ("A", "B", "C", "2d")
WIRINGS = ("author", "port")


def spatial_conv(x: Tensor, w: Tensor, stride: int = 1) -> Tensor:
    """S: 1x3x3 convolution, stride (1, s, s), padding (0, 1, 1). x [N, Ci, T, H, W], w [Co, Ci, 1, 3, 3]."""
    return F.conv3d(x, w, stride=(1, stride, stride), padding=(0, 1, 1))


def temporal_conv(x: Tensor, w: Tensor, stride: int = 1) -> Tensor:
    """T: 3x1x1 convolution, stride (s, 1, 1), padding (1, 0, 0). x [N, Ci, T, H, W], w [Co, Ci, 3, 1, 1]."""
    return F.conv3d(x, w, stride=(stride, 1, 1), padding=(1, 0, 0))


def pointwise_conv(x: Tensor, w: Tensor, stride: int = 1) -> Tensor:
    """1x1x1 convolution, stride (1, s, s). x [N, Ci, T, H, W], w [Co, Ci, 1, 1, 1]."""
    return F.conv3d(x, w, stride=(1, stride, stride))


def batch_norm(z: Tensor, norm: Norm) -> Tensor:
    """Batch normalisation of z [N, C, T, H, W] as `torch.nn.BatchNorm3d`; running statistics move if `norm` says so."""
    running = norm.running_mean, norm.running_var
    remember(norm)
    if norm.updates and norm.momentum is None and z.numel():  # cumulative mean, without reading the counter on the host
        var, mean = torch.var_mean(z.detach().double(), (0, *range(2, z.dim())))
        update_running([norm], [mean], [var])
        running = None, None
    elif norm.updates and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    momentum = 0.0 if norm.momentum is None else norm.momentum
    return F.batch_norm(z, *running, norm.weight, norm.bias, norm.training, momentum, norm.eps)


def bn_relu(x: Tensor, norm: Norm, residual: Tensor | None = None) -> Tensor:
    """relu(bn(x)) or relu(bn(x) + residual). x, residual [N, C, T, H, W]."""
    u = batch_norm(x, norm)
    return F.relu(u if residual is None else u + residual)


def max_pool(x: Tensor, kernel: tuple, stride: tuple, padding: tuple = (0, 0, 0), ceil_mode: bool = False) -> Tensor:
    """Max-pool over (T, H, W), as `torch.nn.functional.max_pool3d`."""
    return F.max_pool3d(x, kernel, stride, padding, ceil_mode=ceil_mode)


def stem_pool(wiring: str) -> dict:
    """The geometry of the pool that ends the stem: (2, 3, 3) stride 2 in both wirings, padded differently."""
    padding, ceil_mode = {"author": ((0, 0, 0), True), "port": ((0, 1, 1), False)}[wiring]
    return {"kernel": (2, 3, 3), "stride": (2, 2, 2), "padding": padding, "ceil_mode": ceil_mode}


def stem(x: Tensor, w: Tensor, norm: Norm, wiring: str = "author") -> Tensor:
    """max_pool(relu(bn(conv(x)))), conv 1x7x7 of stride (1, 2, 2). x [N, Ci, T, H, W], w [Co, Ci, 1, 7, 7]."""
    z = F.conv3d(x, w, stride=(1, 2, 2), padding=(0, 3, 3))
    return max_pool(bn_relu(z, norm), **stem_pool(wiring))


def pseudo3d_conv(
    x: Tensor, w_s: Tensor, norm_s: Norm, w_t: Tensor | None, norm_t: Norm | None, *, kind: str, wiring: str = "author"
) -> Tensor:
    """The spatial and temporal convolutions of one P3D block, joined as `kind` and `wiring` say (table above).

    x [N, Ci, T, H, W], w_s [Co, Ci, 1, 3, 3], w_t [Co, Cm, 3, 1, 1] with Cm = Ci in kind B, else Co.
    """
    a_s = bn_relu(spatial_conv(x, w_s), norm_s)
    if kind == "2d":
        return a_s
    u_t = batch_norm(temporal_conv(x if kind == "B" else a_s, w_t), norm_t)
    if kind == "A":
        return F.relu(u_t)
    if wiring == "port":
        return a_s + F.relu(u_t)
    return F.relu(a_s + u_t) if kind == "B" else F.relu(0.5 * a_s + 0.5 * u_t)


def bottleneck(
    x: Tensor,
    w_reduce: Tensor,
    norm_reduce: Norm,
    w_s: Tensor,
    norm_s: Norm,
    w_t: Tensor | None,
    norm_t: Norm | None,
    w_expand: Tensor,
    norm_expand: Norm,
    w_down: Tensor | None = None,
    norm_down: Norm | None = None,
    *,
    kind: str,
    wiring: str = "author",
    stride: int = 1,
) -> Tensor:
    """relu(bn(expand(pseudo3d_conv(relu(bn(reduce(x)))))) + r), r = x or bn(down(x)).

    x [N, Ci, T, H, W]; w_reduce [M, Ci, 1, 1, 1] and w_down [Co, Ci, 1, 1, 1] have stride (1, s, s);
    w_expand [Co, M, 1, 1, 1]. Without w_down, Ci = Co and stride = 1.
    """
    residual = x if w_down is None else batch_norm(pointwise_conv(x, w_down, stride), norm_down)
    a = bn_relu(pointwise_conv(x, w_reduce, stride), norm_reduce)
    a = pseudo3d_conv(a, w_s, norm_s, w_t, norm_t, kind=kind, wiring=wiring)
    return bn_relu(pointwise_conv(a, w_expand), norm_expand, residual)

"""Fixed and learnable linear maps without states: DCT, AXAT, pooling over channels, convolution with batch norm."""

from __future__ import annotations

import copy
import math
from typing import Literal

import torch
from torch import Tensor, nn

from snn_compile.neuron.checks import check_count


class DCT(nn.Module):
    r"""Blockwise discrete cosine transform (DCT-II, orthonormal) of the last two dimensions: :math:`K A K^T` a block.

    Args:
        kernel_size: n, the size of a block [n, n].

    Shapes: [*, H, W] -> [*, H, W], H and W divisible by n.
    Raises: ValueError where H or W is not divisible by kernel_size.
    Paper: Garg et al., "DCT-SNN: using DCT to distribute spatial information over time", ICCV 2021 (arXiv 2010.01795).
    """

    kernel: Tensor

    def __init__(self, kernel_size: int):
        check_count("kernel_size", kernel_size)
        super().__init__()
        self.kernel_size = n = kernel_size
        row, column = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)[None, :]
        kernel = torch.cos((column + 0.5) * math.pi * row / n) * math.sqrt(2 / n)
        kernel[0] = math.sqrt(1 / n)
        self.register_buffer("kernel", kernel.float())

    def forward(self, x: Tensor) -> Tensor:
        n = self.kernel_size
        if x.dim() < 2 or x.shape[-2] % n or x.shape[-1] % n:
            raise ValueError(f"the last two dimensions of x must be divisible by kernel_size = {n}, but x is {list(x.shape)}")
        *batch, height, width = x.shape
        blocks = x.reshape(*batch, height // n, n, width // n, n).transpose(-3, -2)
        return (self.kernel @ blocks @ self.kernel.T).transpose(-3, -2).reshape(x.shape)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}"


class AXAT(nn.Module):
    r"""Two-sided linear map of square matrices: :math:`A X A^T`, A [out_features, in_features] learnable.

    Shapes: [*, in_features, in_features] -> [*, out_features, out_features].
    Raises: ValueError where the last two dimensions are not in_features.
    """

    def __init__(self, in_features: int, out_features: int):
        check_count("in_features", in_features)
        check_count("out_features", out_features)
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.A = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        n = self.in_features
        if x.dim() < 2 or x.shape[-2:] != (n, n):
            raise ValueError(f"x must be [*, in_features, in_features] = [*, {n}, {n}], but is {list(x.shape)}")
        return self.A @ x @ self.A.T

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class ChannelsPool(nn.Module):
    """Pools over the channel dimension.

    Args:
        pool: `nn.MaxPool1d(...)` or `nn.AvgPool1d(...)`.

    Shapes: [N, C, H, W] -> [N, C', H, W].
    Raises: TypeError where pool is another module; ValueError where x is not 4-D.
    """

    def __init__(self, pool: nn.MaxPool1d | nn.AvgPool1d):
        if not isinstance(pool, (nn.MaxPool1d, nn.AvgPool1d)):
            raise TypeError(f"pool must be a MaxPool1d or an AvgPool1d, but is {pool!r}")
        super().__init__()
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            raise ValueError(f"x must be [N, C, H, W], but is {list(x.shape)}")
        n, _, height, width = x.shape
        pooled = self.pool(x.flatten(2).transpose(1, 2))  # [N, H*W, C']
        return pooled.transpose(1, 2).reshape(n, -1, height, width)


class ConvBatchNorm2d(nn.Module):
    r"""Convolution without bias, then batch normalisation, which can be fused into one convolution with bias.

    .. math::
        W_{fused} = W\,\frac{\gamma}{\sqrt{\sigma^2 + \epsilon}}, \qquad
        b_{fused} = \beta - \mu\,\frac{\gamma}{\sqrt{\sigma^2 + \epsilon}}

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode: as `nn.Conv2d`.
        eps, momentum, affine, track_running_stats: as `nn.BatchNorm2d`.

    Shapes: [N, C, H, W] -> [N, C', H', W'].
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
    ):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, False, padding_mode)
        self.bn = nn.BatchNorm2d(out_channels, eps, momentum, affine, track_running_stats)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))

    def _scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """What the batch norm does to each channel in eval mode: y*scale + shift."""
        mean, variance = self.bn.running_mean, self.bn.running_var
        if mean is None or variance is None:
            raise ValueError("track_running_stats must be True to fuse the batch norm, but is False")
        scale = 1 / torch.sqrt(variance + self.bn.eps)
        if not self.bn.affine:
            return scale, -mean * scale
        scale = self.bn.weight * scale
        return scale, self.bn.bias - mean * scale

    def get_fused_weight(self) -> Tensor:
        """The weight of the fused convolution."""
        scale, _ = self._scale_and_shift()
        return self.conv.weight * scale.view(-1, 1, 1, 1)

    def get_fused_bias(self) -> Tensor:
        """The bias of the fused convolution."""
        _, shift = self._scale_and_shift()
        return shift

    @torch.no_grad()
    def scale_fused_weight(self, k: float | None = None, b: float | None = None) -> None:
        """Make the fused weight k*weight + b, in place; the fused bias stays."""
        scale, _ = self._scale_and_shift()
        if b is not None and (scale == 0).any():
            raise ValueError(f"b must be None where a channel's batch norm weight is 0, but is {b!r}")
        if k is not None:
            self.conv.weight.mul_(k)
        if b is not None:
            self.conv.weight.add_(b / scale.view(-1, 1, 1, 1))

    @torch.no_grad()
    def scale_fused_bias(self, k: float | None = None, b: float | None = None) -> None:
        """Make the fused bias k*bias + b, in place; the fused weight stays."""
        if not self.bn.affine:
            raise ValueError("affine must be True to scale the fused bias, but is False")
        bias = self.get_fused_bias()
        if k is not None:
            self.bn.bias.add_(bias * (k - 1))
        if b is not None:
            self.bn.bias.add_(b)

    def get_fused_conv(self) -> nn.Conv2d:
        """The convolution with bias that equals this module in eval mode; a copy, with parameters of its own."""
        fused = copy.deepcopy(self.conv)
        fused.weight = nn.Parameter(self.get_fused_weight().detach().clone())
        fused.bias = nn.Parameter(self.get_fused_bias().detach().clone())
        return fused


class PrintShapeModule(nn.Module):
    """Prints the shape of its input, and is the identity: for finding out what flows where.

    Args:
        ext_str: what to print before the shape.
    """

    def __init__(self, ext_str: str = "PrintShapeModule"):
        super().__init__()
        self.ext_str = ext_str

    def forward(self, x: Tensor) -> Tensor:
        print(self.ext_str, tuple(x.shape))
        return x

    def extra_repr(self) -> str:
        return repr(self.ext_str)

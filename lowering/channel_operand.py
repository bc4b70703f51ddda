"""A tensor of a call that runs channel by channel, and how it lies in memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from snn_compile.lowering.channels_last import fits, row_stride
from snn_compile.lowering.triton.channel_layout import Place, place


@dataclass(frozen=True)
class Operand:
    """A tensor of a call; `timed`: dim 0 is time, read or written back to front where `reverse`."""

    tensor: Tensor
    timed: bool = False
    reverse: bool = False
    #: what the tensor is a copy of, where it is one
    copied: Tensor | None = None

    def place(self, shape: torch.Size) -> Place | None:
        return place(self.tensor, self.timed, self.reverse, shape)

    def from_first_step(self) -> Tensor:
        """A tensor that begins where the first step's value does."""
        return self.tensor[-1] if self.reverse else self.tensor

    def address(self) -> int:
        start = (self.tensor.shape[0] - 1) * self.tensor.stride(0) if self.reverse else 0
        return self.tensor.data_ptr() + start * self.tensor.element_size()

    def strides(self, dim: int, is_channels_last: bool) -> tuple[int, int, int]:
        """Step, row, channel; `dim`: the number of dims of a whole value ``[N, C, *space]``."""
        sizes, strides = self.tensor.shape[self.timed :], self.tensor.stride()[self.timed :]
        step = (-1 if self.reverse else 1) * self.tensor.stride(0) if self.timed else 0
        if len(strides) != dim:
            return step, 0, next((s for s, size in zip(strides, sizes, strict=True) if size != 1), 0)
        if is_channels_last:
            return step, row_stride(sizes, strides) or 0, 1
        return step, strides[0], strides[1]

    def fits(self, dim: int, channels_last: bool) -> bool:
        """fp32, and as `fits` says."""
        return (
            self.tensor.dtype == torch.float32 and self.tensor.numel() > 0 and fits(self.tensor, dim, channels_last, self.timed)
        )

"""The steps of a tensor: views that are made when they are asked for.

A view costs about a microsecond, and steps that run in C++ need none; `unbind` would make them all.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Series(Protocol):
    """One tensor for each step."""

    def __getitem__(self, t: int) -> Tensor: ...


#: bytes: where PyTorch's allocator puts a new CPU tensor
ALIGNMENT = 64


class Slices(Series):
    """``tensor[t]``, back to front where `reverse`."""

    def __init__(self, tensor: Tensor, reverse: bool = False) -> None:
        self.tensor, self.reverse = tensor, reverse

    def __getitem__(self, t: int) -> Tensor:
        return self.tensor.select(0, self.tensor.shape[0] - 1 - t if self.reverse else t)

    @property
    def is_aligned(self) -> bool:
        """Whether each of them lies in memory as a new tensor does."""
        return self.tensor.stride(0) * self.tensor.element_size() % ALIGNMENT == 0


class Before(Series):
    """States before each step: the initial one, and those `after` the other steps."""

    def __init__(self, init: Tensor, after: Tensor) -> None:
        self.init, self.after = init, after

    def __getitem__(self, t: int) -> Tensor:
        return self.after.select(0, t - 1) if t else self.init


class Constant(Series):
    """The same tensor in each step."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __getitem__(self, t: int) -> Tensor:
        return self.tensor

"""Integrate and fire: the potential sums the input.

h = v + x
"""

from __future__ import annotations

from torch import Tensor, nn

from snn_compile.neuron.base import BaseNode


class IFNode(BaseNode):
    r"""Integrate-and-fire neuron: :math:`h = v + x`.

    Fire, reset, arguments, shapes and errors: see `BaseNode`.
    Paper: Lapicque 1907, translated in Brunel and van Rossum, Biological Cybernetics 2007.
    """

    def neuronal_charge(self, x: Tensor, v: Tensor) -> Tensor:
        return v + x


class SimpleIFNode(IFNode):
    r"""`IFNode` without `store_v_seq`: :math:`h = v + x`."""

    def __init__(
        self,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: nn.Module | None = None,
        detach_reset: bool = False,
        step_mode: str = "s",
    ):
        super().__init__(v_threshold, v_reset, surrogate_function, detach_reset, step_mode)

"""Neurons that integrate and never fire: read-outs of a network."""

from __future__ import annotations

import torch
from torch import Tensor

from snn_compile.neuron.checks import check_choice, check_floating, check_sequence, check_tau
from snn_compile.neuron.multi_step import MultiStepModule

DECODES = (None, "max-mem", "max-abs-mem", "mean-mem", "last-mem")


class NonSpikingBaseNode(MultiStepModule):
    r"""An integrator; multi-step only, and every call starts from v = 0.

    Args:
        decode: what is put out: None, the potentials of all steps, [T, N, *]; 'max-mem', their largest over T, [N, *];
            'max-abs-mem', the one of largest size, with its sign (the smallest where the sizes are equal); 'mean-mem',
            their mean; 'last-mem', the last.

    Shapes: x_seq [T, N, *] -> [T, N, *], or [N, *] where `decode` is given.
    Raises: ValueError where `decode` is unknown or x_seq is not [T, N, *].
    """

    def __init__(self, decode: str | None = None):
        super().__init__()
        check_choice("decode", decode, DECODES)
        self.decode = decode

    def neuronal_charge(self, x: Tensor, v: Tensor) -> Tensor:
        """The potential after charging with the input x."""
        raise NotImplementedError(f"{type(self).__name__} must give its charge in neuronal_charge(x, v)")

    def forward(self, x_seq: Tensor) -> Tensor:
        check_sequence(x_seq)
        check_floating(x_seq)
        v = torch.zeros_like(x_seq[0])
        v_seq = []
        for x in x_seq.unbind(0):
            v = self.neuronal_charge(x, v)
            v_seq.append(v)
        return self._decode(torch.stack(v_seq))

    def _decode(self, v_seq: Tensor) -> Tensor:
        if self.decode == "max-mem":
            return v_seq.max(0).values
        if self.decode == "max-abs-mem":
            largest, smallest = v_seq.max(0).values, v_seq.min(0).values
            return torch.where(largest.abs() > smallest.abs(), largest, smallest)
        if self.decode == "mean-mem":
            return v_seq.mean(0)
        if self.decode == "last-mem":
            return v_seq[-1]
        return v_seq

    def extra_repr(self) -> str:
        return f"decode={self.decode!r}"


class NonSpikingIFNode(NonSpikingBaseNode):
    r"""Integrator: :math:`v = v + x`. See `NonSpikingBaseNode`."""

    def neuronal_charge(self, x: Tensor, v: Tensor) -> Tensor:
        return v + x


class NonSpikingLIFNode(NonSpikingBaseNode):
    r"""Leaky integrator: :math:`v = v + \frac{1}{\tau}(x - v)`. See `NonSpikingBaseNode`.

    Args:
        tau: membrane time constant in steps, a float greater than 1.

    Raises: ValueError where tau is not a float greater than 1.
    """

    def __init__(self, tau: float = 2.0, decode: str | None = None):
        check_tau("tau", tau)
        super().__init__(decode)
        self.tau = tau

    def neuronal_charge(self, x: Tensor, v: Tensor) -> Tensor:
        return v + (x - v) / self.tau

    def extra_repr(self) -> str:
        return f"tau={self.tau}, {super().extra_repr()}"

"""Layers with a state at each synapse or channel: low-pass synapses and neuronal normalisation."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from snn_compile.neuron.checks import check_above, check_bool, check_count
from snn_compile.neuron.stateful import StatefulModule


class SynapseFilter(StatefulModule):
    r"""Low-pass synapse: a current that decays while no spike comes in.

    .. math:: i = i - \frac{1}{\tau}(1 - s)\,i + s

    Args:
        tau: time constant in steps, greater than 1.
        learnable: learn :math:`1/\tau = \sigma(w)`, one scalar w for the layer.
        step_mode: 's', [N, *] -> [N, *]; 'm', [T, N, *] -> [T, N, *].

    States: the current out_i, from 0.
    Raises: ValueError where tau is not greater than 1.
    Paper: Diehl and Cook, "Unsupervised learning of digit recognition using STDP", Frontiers in Computational
        Neuroscience 2015.
    """

    def __init__(self, tau: float = 100.0, learnable: bool = False, step_mode: str = "s"):
        check_above("tau", tau, 1)
        check_bool("learnable", learnable)
        super().__init__(step_mode)
        self.learnable = learnable
        if learnable:
            self.w = nn.Parameter(torch.tensor(-math.log(tau - 1)))
        else:
            self.tau = tau
        self.register_state("out_i", 0.0)

    def step(self, s: Tensor, i: Tensor) -> tuple[Tensor, ...]:
        if self.learnable:
            i = i - (1 - s) * i * self.w.sigmoid() + s
        else:
            i = i - (1 - s) * i / self.tau + s
        return i, i

    def extra_repr(self) -> str:
        tau = 1 / self.w.detach().sigmoid().item() if self.learnable else self.tau
        return f"tau={tau:.4g}, learnable={self.learnable}, step_mode={self.step_mode!r}"


class NeuNorm(StatefulModule):
    r"""Neuronal normalisation: a trace of the spikes of all channels inhibits each channel.

    .. math::
        x &= k\,x + \frac{1-k}{C^2} \sum_c s_c \\
        y &= s - w\,x

    Args:
        in_channels, height, width: C, H, W of the spikes [N, C, H, W].
        k: factor by which the trace decays each step.
        shared_across_channels: one weight for all channels, w [1, H, W]; otherwise w [C, H, W].
        step_mode: 's', [N, C, H, W] -> the same; 'm', [T, N, C, H, W] -> the same.

    States: the trace x [N, 1, H, W], from 0.
    Raises: ValueError where a size is not a positive integer or the input is not [N, C, H, W] at each step.
    Paper: Wu et al., "Direct training for spiking neural networks: faster, larger, better", AAAI 2019
        (arXiv 1809.05793).
    """

    def __init__(
        self,
        in_channels: int,
        height: int,
        width: int,
        k: float = 0.9,
        shared_across_channels: bool = False,
        step_mode: str = "s",
    ):
        for name, value in (("in_channels", in_channels), ("height", height), ("width", width)):
            check_count(name, value)
        super().__init__(step_mode)
        self.in_channels = in_channels
        self.k0 = k
        self.k1 = (1 - k) / in_channels**2
        self.w = nn.Parameter(torch.empty(1 if shared_across_channels else in_channels, height, width))
        nn.init.kaiming_uniform_(self.w, a=math.sqrt(5))
        self.register_state("x", 0.0)

    def state_like(self, s: Tensor) -> Tensor:
        wanted = (self.in_channels, *self.w.shape[1:])
        if s.dim() != 4 or s.shape[1:] != wanted:
            raise ValueError(f"the input must be [N, C, H, W] = [N, {wanted}] at each step, but is {list(s.shape)}")
        return s[:, :1]

    def step(self, s: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        x = self.k0 * x + self.k1 * s.sum(dim=1, keepdim=True)
        return s - self.w * x, x

    def extra_repr(self) -> str:
        return f"w={list(self.w.shape)}, k={self.k0}, step_mode={self.step_mode!r}"

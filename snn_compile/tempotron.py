"""The tempotron: one neuron that learns to tell spike patterns apart by when its inputs fire."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snn_compile.neuron.checks import check_above, check_choice, check_count

RET_TYPES = ("v", "v_max", "spikes")


class Tempotron(nn.Module):
    r"""Tempotron: each input fires at most once; a neuron fires once, at its potential's peak, if that is high enough.

    .. math::
        v(t) &= \sum_i w_i\,K(t - t_i) \\
        K(t) &= v_0\left(e^{-t/\tau} - e^{-t/\tau_s}\right)\ \text{for } t \ge 0,\text{ else } 0

    with v_0 such that the maximum of K is v_threshold.

    Args:
        in_features: number of inputs.
        out_features: number of neurons.
        T: number of steps; t runs over 0, ..., T - 1.
        tau: time constant of the membrane, in steps.
        tau_s: time constant of the synapse, in steps, less than tau.
        v_threshold: a neuron whose peak reaches it fires.

    Shapes: times [N, in_features], spike times in [0, T), negative for no spike -> by `ret_type`:
        'v', the potentials [N, out_features, T]; 'v_max', their peaks [N, out_features]; 'spikes', the firing times
        [N, out_features], -1 where the peak stays under v_threshold. A firing time is the argmax; its gradient is that
        of the softmax-weighted mean time.
    Raises: ValueError where an argument is out of range, times is not [N, in_features], or `ret_type` is unknown.
    Paper: Guetig and Sompolinsky, "The tempotron: a neuron that learns spike timing-based decisions", Nature
        Neuroscience 2006.

    Fixed against the original: a batch of one keeps its dimension, an unknown `ret_type` raises, and a silent neuron
    gives -1 even where its peak is at step 0.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        T: int,
        tau: float = 15.0,
        tau_s: float = 15.0 / 4,
        v_threshold: float = 1.0,
    ):
        for name, value in (("in_features", in_features), ("out_features", out_features), ("T", T)):
            check_count(name, value)
        check_above("tau_s", tau_s, 0)
        check_above("tau", tau, tau_s)
        check_above("v_threshold", v_threshold, 0)
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.T = T
        self.tau = tau
        self.tau_s = tau_s
        self.v_threshold = v_threshold
        self.fc = nn.Linear(in_features, out_features, bias=False)
        t_peak = tau * tau_s * math.log(tau / tau_s) / (tau - tau_s)
        self.v0 = v_threshold / (math.exp(-t_peak / tau) - math.exp(-t_peak / tau_s))

    def psp_kernel(self, t: Tensor) -> Tensor:
        """K(t), the potential that one input spike of weight 1 leaves after t steps."""
        t = t.clamp_min(0)  # K(0) is 0
        return self.v0 * (torch.exp(-t / self.tau) - torch.exp(-t / self.tau_s))

    def forward(self, times: Tensor, ret_type: str) -> Tensor:
        check_choice("ret_type", ret_type, RET_TYPES)
        if times.dim() != 2 or times.shape[1] != self.in_features:
            raise ValueError(f"times must be [N, in_features = {self.in_features}], but is {list(times.shape)}")
        t = torch.arange(self.T, dtype=self.fc.weight.dtype, device=times.device)
        spikes = (times >= 0).to(t.dtype)
        psp = self.psp_kernel(t - times.unsqueeze(-1)) * spikes.unsqueeze(-1)  # [N, in_features, T]
        v = self.fc.weight @ psp
        if ret_type == "v":
            return v
        if ret_type == "v_max":
            return v.amax(-1)
        return self._firing_times(v, t)

    def _firing_times(self, v: Tensor, t: Tensor) -> Tensor:
        soft = (torch.softmax(v * self.T, -1) * t).sum(-1)
        time = v.argmax(-1) + (soft - soft.detach())
        return torch.where(v.amax(-1) >= self.v_threshold, time, -1.0)

    @staticmethod
    def mse_loss(v_max: Tensor, v_threshold: float, label: Tensor, num_classes: int) -> Tensor:
        """Squared distance from the threshold of the neurons that fired or kept silent wrongly, a sample.

        Args:
            v_max: peaks [N, num_classes].
            label: the class of each sample, [N]; the neuron of that class should fire, the others should not.
        """
        wrong = (v_max >= v_threshold).to(v_max.dtype) != F.one_hot(label, num_classes).to(v_max.dtype)
        return ((v_max - v_threshold) * wrong).square().sum() / label.shape[0]

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, T={self.T}, tau={self.tau}, "
            f"tau_s={self.tau_s}, v_threshold={self.v_threshold}"
        )

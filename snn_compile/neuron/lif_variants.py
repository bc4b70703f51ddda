"""Neurons that charge like LIF and differ in what they fire, reset or put out: KLIF, LIAF, ALIF."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from snn_compile.neuron.checks import check_bool, check_float
from snn_compile.neuron.lif import LIFNode


class KLIFNode(LIFNode):
    r"""LIF neuron whose potential is scaled by a learnable k and rectified before it fires.

    .. math::
        h &= \mathrm{ReLU}(k\,\mathrm{LIF}(v, x)) \\
        s &= H(h - v_{threshold})

    then the reset of `BaseNode`; with `scale_reset`, of h/k with the threshold v_threshold/k.

    Args:
        scale_reset: whether the reset undoes the scaling by k.
        Others: see `LIFNode`, as are the shapes and errors.

    Paper: Jiang and Zhang, "KLIF: an optimized spiking neuron unit", arXiv 2302.09238.
    """

    def __init__(
        self,
        scale_reset: bool = False,
        tau: float = 2.0,
        decay_input: bool = True,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: nn.Module | None = None,
        detach_reset: bool = False,
        step_mode: str = "s",
        store_v_seq: bool = False,
    ):
        check_bool("scale_reset", scale_reset)
        super().__init__(tau, decay_input, v_threshold, v_reset, surrogate_function, detach_reset, step_mode, store_v_seq)
        self.scale_reset = scale_reset
        self.k = nn.Parameter(torch.tensor(1.0))

    def neuronal_charge(self, x: Tensor, v: Tensor) -> Tensor:
        return torch.relu(self.k * super().neuronal_charge(x, v))

    def neuronal_reset(self, h: Tensor, s: Tensor) -> Tensor:
        if not self.scale_reset:
            return super().neuronal_reset(h, s)
        if self.detach_reset:
            s = s.detach()
        if self.v_reset is None:
            return h / self.k - s * (self.v_threshold / self.k)
        return s * self.v_reset + (1 - s) * (h / self.k)

    def extra_repr(self) -> str:
        return f"scale_reset={self.scale_reset}, {super().extra_repr()}"


class LIAFNode(LIFNode):
    r"""LIF neuron that puts out an activation of its potential, not spikes; spikes only reset it.

    .. math::
        h &= \mathrm{LIF}(v, x) \\
        y &= \mathrm{act}(h - v_{threshold}) \text{ if threshold\_related, else } \mathrm{act}(h)

    Args:
        act: the activation, a function of a tensor.
        threshold_related: whether the threshold is subtracted before the activation.
        Others: see `LIFNode`, as are the shapes and errors.

    Paper: Wu et al., "LIAF-Net: leaky integrate and analog fire network", arXiv 2011.06176.
    """

    def __init__(self, act: Callable[[Tensor], Tensor], threshold_related: bool, *args, **kwargs):
        if not callable(act):
            raise TypeError(f"act must be a function of a tensor, but is {act!r}")
        check_bool("threshold_related", threshold_related)
        super().__init__(*args, **kwargs)
        self.act = act
        self.threshold_related = threshold_related

    def step(self, x: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        h = self.neuronal_charge(x, v)
        y = self.act(h - self.v_threshold if self.threshold_related else h)
        v = self.neuronal_reset(h, self.neuronal_fire(h))
        return y, v


class ALIFNode(LIFNode):
    r"""LIF neuron with an adaptive threshold: each spike raises it by a trace b that decays.

    .. math::
        b &= \rho\,b + (1 - \rho)\,s_{previous} \\
        h &= \mathrm{LIF}(v, x) \\
        s &= H(h - (v_{threshold} + \beta b))

    then the reset of `BaseNode`; the soft reset subtracts v_threshold.

    Args:
        rho: factor by which b decays each step, in [0, 1].
        beta: how much b raises the threshold, in units of v_threshold.
        Others: see `LIFNode`, as are the shapes and errors.

    States: v, and b after the spikes of the step, which is the b that the next step fires against; it starts from 0.
    Raises: ValueError where rho lies outside [0, 1].
    Paper: Bellec et al., "Long short-term memory and learning-to-learn in networks of spiking neurons", NeurIPS 2018
        (arXiv 1803.09574).
    """

    def __init__(
        self,
        tau: float = 2.0,
        decay_input: bool = True,
        rho: float = 0.9,
        beta: float = 1.8,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: nn.Module | None = None,
        detach_reset: bool = False,
        step_mode: str = "s",
        store_v_seq: bool = False,
    ):
        check_float("rho", rho)
        check_float("beta", beta)
        if not 0 <= rho <= 1:
            raise ValueError(f"rho must lie in [0, 1], but is {rho!r}")
        super().__init__(tau, decay_input, v_threshold, v_reset, surrogate_function, detach_reset, step_mode, store_v_seq)
        self.rho = rho
        self.beta = beta
        self.register_state("b", 0.0)

    def step(self, x: Tensor, v: Tensor, b: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        h = self.neuronal_charge(x, v)
        s = self.surrogate_function(h - (self.v_threshold + self.beta * b))
        v = self.neuronal_reset(h, s)
        b = self.rho * b + (1 - self.rho) * s
        return s, v, b

    def extra_repr(self) -> str:
        return f"rho={self.rho}, beta={self.beta}, {super().extra_repr()}"

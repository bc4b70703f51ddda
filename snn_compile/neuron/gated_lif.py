"""The gated LIF neuron: learnable gates choose between the biological mechanisms of a LIF neuron."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from snn_compile.neuron.checks import check_choice, check_count, check_sequence
from snn_compile.neuron.stateful import StatefulModule
from snn_compile.surrogate import Sigmoid


class GatedLIFNode(StatefulModule):
    r"""Gated LIF neuron (GLIF); multi-step only.

    .. math::
        decay &= 1 - \alpha(1 - \tau) \\
        h &= decay\,v - (1 - \alpha)\,l + x\,(1 - \beta(1 - c_t)) \\
        v &= h - s_{previous}\left(decay\,\gamma\,v + (1 - \gamma)\,r\right) \\
        s &= H(v - v_{threshold})

    Every symbol is the sigmoid of a learnable parameter: the gates alpha (exponential or linear leak), beta (gain of
    the input) and gamma (hard or soft reset), tau (leak), l = linear_decay, r = v_subreset, v_threshold, and
    c_t = conduct, one for each step.

    Args:
        T: number of steps of a sequence; conduct has one row for each.
        inplane: number of channels C, for parameters of their own for each channel; None, one of each for the layer.
        init_linear_decay: linear_decay at the start; None is init_v_threshold/(2T).
        init_v_subreset: v_subreset at the start; None is init_v_threshold.
        init_tau, init_v_threshold, init_conduct: the others at the start, all between 0 and 1.
        surrogate_function: None is `Sigmoid()`.
        step_mode: 'm' is the only one.

    States: v, and the spikes s of the last step, both from 0; both persist until `reset()`.
    Shapes: x_seq [T, N, C, *] -> the same.
    Raises: ValueError where an initial value lies outside (0, 1), a count is not a positive integer, or x_seq has
        another number of steps or channels.
    Paper: Yao et al., "GLIF: a unified gated leaky integrate-and-fire neuron", NeurIPS 2022 (arXiv 2210.13768).
    """

    step_modes = ("m",)

    def __init__(
        self,
        T: int,
        inplane: int | None = None,
        init_linear_decay: float | None = None,
        init_v_subreset: float | None = None,
        init_tau: float = 0.25,
        init_v_threshold: float = 0.5,
        init_conduct: float = 0.5,
        surrogate_function: nn.Module | None = None,
        step_mode: str = "m",
    ):
        check_count("T", T)
        if inplane is not None:
            check_count("inplane", inplane)
        super().__init__(step_mode)
        self.T = T
        self.inplane = inplane
        self.surrogate_function = Sigmoid() if surrogate_function is None else surrogate_function
        if init_linear_decay is None:
            init_linear_decay = init_v_threshold / (2 * T)
        if init_v_subreset is None:
            init_v_subreset = init_v_threshold

        shape = () if inplane is None else (inplane,)
        self.alpha, self.beta, self.gamma = (nn.Parameter(0.2 * (torch.rand(shape) - 0.5)) for _ in range(3))
        self.tau = nn.Parameter(_logit("init_tau", init_tau, shape))
        self.v_threshold = nn.Parameter(_logit("init_v_threshold", init_v_threshold, shape))
        self.linear_decay = nn.Parameter(_logit("init_linear_decay", init_linear_decay, shape))
        self.v_subreset = nn.Parameter(_logit("init_v_subreset", init_v_subreset, shape))
        self.conduct = nn.Parameter(_logit("init_conduct", init_conduct, (T, *shape)))
        self.register_state("v", 0.0)
        self.register_state("s", 0.0)

    def multi_step_forward(self, x_seq: Tensor) -> Tensor:
        self._check(x_seq)
        v, s = self.states_for(x_seq[0])
        alpha, beta, gamma = (self._gate(p, x_seq) for p in (self.alpha, self.beta, self.gamma))
        tau, leak = (self._gate(p, x_seq) for p in (self.tau, self.linear_decay))
        v_threshold, v_subreset = (self._gate(p, x_seq) for p in (self.v_threshold, self.v_subreset))
        conduct_seq = self._gate(self.conduct, x_seq).unbind(0)
        decay = 1 - alpha * (1 - tau)
        s_seq = []
        for x, conduct in zip(x_seq.unbind(0), conduct_seq, strict=True):
            h = decay * v - (1 - alpha) * leak + x * (1 - beta * (1 - conduct))
            v = h - decay * v * gamma * s - (1 - gamma) * v_subreset * s
            s = self.surrogate_function(v - v_threshold)
            s_seq.append(s)
        self.keep([v, s])
        return torch.stack(s_seq)

    def _gate(self, parameter: Tensor, x_seq: Tensor) -> Tensor:
        """The sigmoid of a parameter, in the dtype of the input, broadcastable over a step [N, C, *]."""
        gate = parameter.sigmoid().to(x_seq.dtype)
        return gate if self.inplane is None else gate.view(*parameter.shape, *[1] * (x_seq.dim() - 3))

    def _check(self, x_seq: Tensor) -> None:
        check_sequence(x_seq)
        check_choice("the number of steps of x_seq", x_seq.shape[0], (self.T,))
        if self.inplane is not None and (x_seq.dim() < 3 or x_seq.shape[2] != self.inplane):
            shape = list(x_seq.shape)
            raise ValueError(f"x_seq must be [T, N, C, *] with C = inplane = {self.inplane}, but is {shape}")

    def extra_repr(self) -> str:
        return f"T={self.T}, inplane={self.inplane}"


def _logit(name: str, value: float, shape: tuple[int, ...]) -> Tensor:
    """The parameter whose sigmoid is `value`."""
    if not 0 < value < 1:
        raise ValueError(f"{name} must lie between 0 and 1, but is {value!r}")
    return torch.full(shape, -math.log(1 / value - 1))

"""Leaky integrate and fire: the potential leaks towards its resting value, v_reset, with the time constant tau."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from snn_compile.neuron.base import BaseNode
from snn_compile.neuron.checks import check_bool, check_float, check_tau
from snn_compile.surrogate import Rect


class LIFNode(BaseNode):
    r"""Leaky integrate-and-fire neuron.

    .. math::
        h &= v + \frac{1}{\tau}(x - (v - v_{reset})) && \text{decay_input} \\
        h &= v - \frac{1}{\tau}(v - v_{reset}) + x   && \text{otherwise}

    with :math:`v_{reset} = 0` where `v_reset` is None.

    Args:
        tau: membrane time constant in steps, a float greater than 1.
        decay_input: whether the input is divided by tau as well.
        v_threshold, v_reset, surrogate_function, detach_reset, step_mode, store_v_seq: see `BaseNode`, as are
            the shapes and the errors of a call.

    Raises: ValueError where tau is not a float greater than 1.
    Paper: Gerstner et al., "Neuronal Dynamics", Cambridge University Press 2014, chapter 1.3.
    """

    def __init__(
        self,
        tau: float = 2.0,
        decay_input: bool = True,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: nn.Module | None = None,
        detach_reset: bool = False,
        step_mode: str = "s",
        store_v_seq: bool = False,
    ):
        check_tau("tau", tau)
        check_bool("decay_input", decay_input)
        super().__init__(v_threshold, v_reset, surrogate_function, detach_reset, step_mode, store_v_seq)
        self.tau = tau
        self.decay_input = decay_input

    def neuronal_charge(self, x: Tensor, v: Tensor) -> Tensor:
        # One equation a branch, and each is a floating-point expression of its own.
        if self.decay_input:
            if not self.v_reset:
                return v + (x - v) / self.tau
            return v + (x - (v - self.v_reset)) / self.tau
        if not self.v_reset:
            return v * (1 - 1 / self.tau) + x
        return v - (v - self.v_reset) / self.tau + x

    def extra_repr(self) -> str:
        return f"tau={self.tau}, decay_input={self.decay_input}, {super().extra_repr()}"


class SimpleLIFNode(LIFNode):
    r"""`LIFNode` in its shortest form, without `store_v_seq`.

    .. math::
        h &= v + \frac{1}{\tau}(v_{reset} - v + x) && \text{decay_input} \\
        h &= v + \frac{1}{\tau}(v_{reset} - v) + x && \text{otherwise}

    with :math:`v_{reset} = 0` where `v_reset` is None.
    """

    def __init__(
        self,
        tau: float,
        decay_input: bool,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: nn.Module | None = None,
        detach_reset: bool = False,
        step_mode: str = "s",
    ):
        super().__init__(tau, decay_input, v_threshold, v_reset, surrogate_function, detach_reset, step_mode)

    def neuronal_charge(self, x: Tensor, v: Tensor) -> Tensor:
        v_rest = 0.0 if self.v_reset is None else self.v_reset
        if self.decay_input:
            return v + (v_rest - v + x) / self.tau
        return v + (v_rest - v) / self.tau + x


class ParametricLIFNode(BaseNode):
    r"""LIF neuron with a learnable time constant: :math:`1/\tau = \sigma(w)`, one scalar parameter w for the layer.

    .. math::
        h &= v + \sigma(w)\,(x - (v - v_{reset})) && \text{decay_input} \\
        h &= v - \sigma(w)\,(v - v_{reset}) + x   && \text{otherwise}

    Args:
        init_tau: tau at the start, in steps, a float greater than 1: :math:`w_0 = -\log(\tau_0 - 1)`.
        decay_input: whether the input is scaled by 1/tau as well.
        v_threshold, v_reset, surrogate_function, detach_reset, step_mode, store_v_seq: see `BaseNode`, as are
            the shapes and the errors of a call.

    Raises: ValueError where init_tau is not a float greater than 1.
    Paper: Fang et al., "Incorporating learnable membrane time constant", ICCV 2021 (arXiv 2007.05785).
    """

    def __init__(
        self,
        init_tau: float = 2.0,
        decay_input: bool = True,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: nn.Module | None = None,
        detach_reset: bool = False,
        step_mode: str = "s",
        store_v_seq: bool = False,
    ):
        check_tau("init_tau", init_tau)
        check_bool("decay_input", decay_input)
        super().__init__(v_threshold, v_reset, surrogate_function, detach_reset, step_mode, store_v_seq)
        self.decay_input = decay_input
        self.w = nn.Parameter(torch.tensor(-math.log(init_tau - 1)))

    @property
    def tau(self) -> float:
        """The present time constant, in steps."""
        return 1 / self.w.detach().sigmoid().item()

    def neuronal_charge(self, x: Tensor, v: Tensor) -> Tensor:
        rate = self.w.sigmoid()
        if self.decay_input:
            if not self.v_reset:
                return v + (x - v) * rate
            return v + (x - (v - self.v_reset)) * rate
        if not self.v_reset:
            return v * (1 - rate) + x
        return v - (v - self.v_reset) * rate + x

    def extra_repr(self) -> str:
        return f"tau={self.tau:.4g}, decay_input={self.decay_input}, {super().extra_repr()}"


class CUBALIFNode(BaseNode):
    r"""Current-based LIF neuron: the input first charges a synaptic current c that decays by itself.

    .. math::
        c &= c\,c_{decay} + x \\
        h &= v\,v_{decay} + c

    Args:
        c_decay: factor by which the current c decays each step.
        v_decay: factor by which the potential v decays each step.
        v_threshold, v_reset, surrogate_function, detach_reset, step_mode, store_v_seq: see `BaseNode`, as are
            the shapes and the errors of a call. The surrogate's default is `Rect()`.

    States: v, and c, which starts from 0.
    Paper: Davies et al., "Loihi: a neuromorphic manycore processor with on-chip learning", IEEE Micro 2018.
    """

    def __init__(
        self,
        c_decay: float = 0.5,
        v_decay: float = 0.75,
        v_threshold: float = 0.5,
        v_reset: float | None = 0.0,
        surrogate_function: nn.Module | None = None,
        detach_reset: bool = False,
        step_mode: str = "s",
        store_v_seq: bool = False,
    ):
        check_float("c_decay", c_decay)
        check_float("v_decay", v_decay)
        surrogate_function = Rect() if surrogate_function is None else surrogate_function
        super().__init__(v_threshold, v_reset, surrogate_function, detach_reset, step_mode, store_v_seq)
        self.c_decay = c_decay
        self.v_decay = v_decay
        self.register_state("c", 0.0)

    def step(self, x: Tensor, v: Tensor, c: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        c = c * self.c_decay + x
        h = v * self.v_decay + c
        s = self.neuronal_fire(h)
        v = self.neuronal_reset(h, s)
        return s, v, c

    def extra_repr(self) -> str:
        return f"c_decay={self.c_decay}, v_decay={self.v_decay}, {super().extra_repr()}"

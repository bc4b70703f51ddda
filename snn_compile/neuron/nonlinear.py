"""Neurons whose charge is not linear in the potential: quadratic, exponential, Izhikevich."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from snn_compile.neuron.base import BaseNode
from snn_compile.neuron.checks import check_above, check_float, check_tau


class QIFNode(BaseNode):
    r"""Quadratic integrate-and-fire neuron.

    .. math:: h = v + \frac{1}{\tau}\left(x + a_0 (v - v_{rest})(v - v_c)\right)

    Args:
        tau: membrane time constant in steps, a float greater than 1.
        v_c: critical potential, above which v grows by itself.
        a0: strength of that growth, greater than 0.
        v_threshold, v_reset, surrogate_function, detach_reset, step_mode, store_v_seq: see `BaseNode`, as are the
            shapes and the errors of a call.
        v_rest: resting potential.

    Raises: ValueError where tau is not a float greater than 1 or a0 is not greater than 0; TypeError where a potential
        is not a float.
    Paper: Gerstner et al., "Neuronal Dynamics", Cambridge University Press 2014, chapter 5.3.
    """

    def __init__(
        self,
        tau: float = 2.0,
        v_c: float = 0.8,
        a0: float = 1.0,
        v_threshold: float = 1.0,
        v_rest: float = 0.0,
        v_reset: float | None = -0.1,
        surrogate_function: nn.Module | None = None,
        detach_reset: bool = False,
        step_mode: str = "s",
        store_v_seq: bool = False,
    ):
        check_tau("tau", tau)
        check_float("v_c", v_c)
        check_float("v_rest", v_rest)
        check_above("a0", a0, 0)
        super().__init__(v_threshold, v_reset, surrogate_function, detach_reset, step_mode, store_v_seq)
        self.tau = tau
        self.v_c = v_c
        self.a0 = a0
        self.v_rest = v_rest

    def neuronal_charge(self, x: Tensor, v: Tensor) -> Tensor:
        return v + (x + self.a0 * (v - self.v_rest) * (v - self.v_c)) / self.tau

    def extra_repr(self) -> str:
        return f"tau={self.tau}, v_c={self.v_c}, a0={self.a0}, v_rest={self.v_rest}, {super().extra_repr()}"


class EIFNode(BaseNode):
    r"""Exponential integrate-and-fire neuron.

    .. math:: h = v + \frac{1}{\tau}\left(x + v_{rest} - v + \Delta_T\, e^{(v - \theta_{rh})/\Delta_T}\right)

    Args:
        tau: membrane time constant in steps, a float greater than 1.
        delta_T: sharpness of the exponential, in the unit of v, greater than 0.
        theta_rh: rheobase threshold, from which on the exponential dominates.
        v_threshold, v_reset, surrogate_function, detach_reset, step_mode, store_v_seq: see `BaseNode`, as are the
            shapes and the errors of a call.
        v_rest: resting potential.

    Raises: ValueError where tau is not a float greater than 1 or delta_T is not greater than 0; TypeError where a
        potential is not a float.
    Paper: Fourcaud-Trocme et al., "How spike generation mechanisms determine the neuronal response to fluctuating
        inputs", Journal of Neuroscience 2003.
    """

    def __init__(
        self,
        tau: float = 2.0,
        delta_T: float = 1.0,
        theta_rh: float = 0.8,
        v_threshold: float = 1.0,
        v_rest: float = 0.0,
        v_reset: float | None = -0.1,
        surrogate_function: nn.Module | None = None,
        detach_reset: bool = False,
        step_mode: str = "s",
        store_v_seq: bool = False,
    ):
        check_tau("tau", tau)
        check_above("delta_T", delta_T, 0)
        check_float("theta_rh", theta_rh)
        check_float("v_rest", v_rest)
        super().__init__(v_threshold, v_reset, surrogate_function, detach_reset, step_mode, store_v_seq)
        self.tau = tau
        self.delta_T = delta_T
        self.theta_rh = theta_rh
        self.v_rest = v_rest

    def neuronal_charge(self, x: Tensor, v: Tensor) -> Tensor:
        upswing = self.delta_T * torch.exp((v - self.theta_rh) / self.delta_T)
        return v + (x + self.v_rest - v + upswing) / self.tau

    def extra_repr(self) -> str:
        return f"tau={self.tau}, delta_T={self.delta_T}, theta_rh={self.theta_rh}, v_rest={self.v_rest}, {super().extra_repr()}"


class IzhikevichNode(BaseNode):
    r"""Izhikevich neuron: quadratic integrate-and-fire with a recovery current w.

    .. math::
        h &= v + \frac{1}{\tau}\left(x + a_0 (v - v_{rest})(v - v_c) - w\right) \\
        w &= w + \frac{1}{\tau_w}\left(a (h - v_{rest}) - w\right) + b\,s

    Args:
        tau, v_c, a0, v_threshold, v_reset, v_rest, surrogate_function, detach_reset, step_mode, store_v_seq: see
            `QIFNode`, as are the shapes and errors.
        w_rest: w at the start.
        tau_w: time constant of w in steps, a float.
        a: how strongly w follows the potential.
        b: by how much a spike raises w.

    States: v, and w, which starts from w_rest. `detach_reset` detaches the spike in the reset of v only.
    Paper: Izhikevich, "Simple model of spiking neurons", IEEE Transactions on Neural Networks 2003.
    """

    def __init__(
        self,
        tau: float = 2.0,
        v_c: float = 0.8,
        a0: float = 1.0,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        v_rest: float = -0.1,
        w_rest: float = 0.0,
        tau_w: float = 2.0,
        a: float = 0.0,
        b: float = 0.0,
        surrogate_function: nn.Module | None = None,
        detach_reset: bool = False,
        step_mode: str = "s",
        store_v_seq: bool = False,
    ):
        check_tau("tau", tau)
        check_above("a0", a0, 0)
        for name, value in (("v_c", v_c), ("v_rest", v_rest), ("w_rest", w_rest), ("tau_w", tau_w), ("a", a), ("b", b)):
            check_float(name, value)
        super().__init__(v_threshold, v_reset, surrogate_function, detach_reset, step_mode, store_v_seq)
        self.tau = tau
        self.v_c = v_c
        self.a0 = a0
        self.v_rest = v_rest
        self.w_rest = w_rest
        self.tau_w = tau_w
        self.a = a
        self.b = b
        self.register_state("w", w_rest)

    def step(self, x: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        h = v + (x + self.a0 * (v - self.v_rest) * (v - self.v_c) - w) / self.tau
        s = self.neuronal_fire(h)
        w = w + (self.a * (h - self.v_rest) - w) / self.tau_w + self.b * s
        v = self.neuronal_reset(h, s)
        return s, v, w

    def extra_repr(self) -> str:
        return (
            f"tau={self.tau}, v_c={self.v_c}, a0={self.a0}, v_rest={self.v_rest}, w_rest={self.w_rest}, "
            f"tau_w={self.tau_w}, a={self.a}, b={self.b}, {super().extra_repr()}"
        )

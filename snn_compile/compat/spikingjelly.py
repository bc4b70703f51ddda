"""The neuron ops of SpikingJelly 2.0 (`sj_lif.forward` and its like) as plain loops.

Each op takes the inputs of all steps ``x [T, ...]`` and the initial potential ``v [...]`` and gives ``(spikes [T, ...],
potential, charged potential [T, ...])``, where the potential is that of every step if `store_v_seq`, else the last one.
SpikingJelly's models call them in both step modes, single steps with T = 1. The order of the operations is the op's, so
the results are equal bit for bit (tested against the wheel in tests/ecosystem). Source: SpikingJelly 2.0.0, `_ops/*/reference.py`
for what is computed; https://github.com/fangwei123456/spikingjelly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from snn_compile import surrogate
from snn_compile.decompositions import register_decomposition

#: SpikingJelly's `surrogate_id` -> `spike(u, alpha)`
SPIKES = (
    surrogate.Sigmoid.spiking_function,
    surrogate.ATan.spiking_function,
    surrogate.PiecewiseQuadratic.spiking_function,
    surrogate.PiecewiseExp.spiking_function,
    surrogate.SoftSign.spiking_function,
    surrogate.SuperSpike.spiking_function,
    surrogate.Erf.spiking_function,
)


def reset(h: Tensor, s: Tensor, threshold: float, v_reset: float | None, detach: bool) -> Tensor:
    """Soft where `v_reset` is None: ``h - s*threshold``; else hard: ``s*v_reset + (1 - s)*h``."""
    s = s.detach() if detach else s
    return h - s * threshold if v_reset is None else s * v_reset + (1.0 - s) * h


def over_time(x, v, charge, threshold, v_reset, detach, alpha, surrogate_id):  # type: ignore[no-untyped-def]
    """Charge, fire, reset at every step -> spikes ``[T, ...]``, the potentials as a list, charged potentials ``[T, ...]``."""
    spikes, potentials, charged = [], [], []
    for t in range(x.shape[0]):
        h = charge(v, x[t])
        s = SPIKES[surrogate_id](h - threshold, alpha)
        v = reset(h, s, threshold, v_reset, detach)
        spikes.append(s.to(x.dtype))
        potentials.append(v)
        charged.append(h)
    return torch.stack(spikes), potentials, torch.stack(charged)


def stored(potentials: list[Tensor], store_v_seq: bool) -> Tensor:
    return torch.stack(potentials) if store_v_seq else potentials[-1]


def before(v: Tensor, potentials: list[Tensor]) -> Tensor:
    """The potential that each step starts from."""
    return torch.stack([v, *potentials[:-1]])


@register_decomposition("sj_if::forward")
def integrate_and_fire(x, v, threshold, v_reset, detach, alpha, store_v_seq=True, surrogate_id=0):  # type: ignore[no-untyped-def]
    """h = v + x"""

    def charge(v, x):  # type: ignore[no-untyped-def]
        return v + x

    spikes, potentials, charged = over_time(x, v, charge, threshold, v_reset, detach, alpha, surrogate_id)
    return spikes, stored(potentials, store_v_seq), charged


@register_decomposition("sj_lif::forward")
def leaky(x, v, tau, decay_input, threshold, v_reset, detach, alpha, store_v_seq=True, surrogate_id=0):  # type: ignore[no-untyped-def]
    """h = v + (x - (v - v_reset))/tau, or h = v - (v - v_reset)/tau + x without `decay_input`"""
    rest = 0.0 if v_reset is None else v_reset

    def charge(v, x):  # type: ignore[no-untyped-def]
        return v + (x - (v - rest)) / tau if decay_input else v - (v - rest) / tau + x

    spikes, potentials, charged = over_time(x, v, charge, threshold, v_reset, detach, alpha, surrogate_id)
    return spikes, stored(potentials, store_v_seq), charged


@register_decomposition("sj_plif::forward")
def parametric_leaky(x, v, w, decay_input, threshold, v_reset, detach, alpha, store_v_seq=True, surrogate_id=0):  # type: ignore[no-untyped-def]
    """As `leaky` with 1/tau = sigmoid(w)"""
    rest, q = 0.0 if v_reset is None else v_reset, w.float().sigmoid()

    def charge(v, x):  # type: ignore[no-untyped-def]
        return v + (x.float() - (v - rest)) * q if decay_input else v - (v - rest) * q + x.float()

    spikes, potentials, charged = over_time(x, v, charge, threshold, v_reset, detach, alpha, surrogate_id)
    return spikes, stored(potentials, store_v_seq), charged


@register_decomposition("sj_ilif::forward")
def integer_leaky(x, v, tau, count, lower, upper, threshold, detach, store_v_seq=True):  # type: ignore[no-untyped-def]
    """h = (1 - 1/tau)*v + x; s = round(clamp(h/threshold, 0, count)), straight through inside [lower, upper]"""
    decay = 1.0 - 1.0 / tau
    spikes, potentials, charged = [], [], []
    for t in range(x.shape[0]):
        h = decay * v + x[t].float()
        u = h / threshold
        window = ((u >= lower) & (u <= upper)).to(h.dtype) + h * 0.0
        s = u.clamp(0.0, count).round() + window * (u - u.detach())
        v = h - (s.detach() if detach else s) * threshold
        spikes.append(s.to(x.dtype))
        potentials.append(v)
        charged.append(h)
    return torch.stack(spikes), torch.stack(potentials) if store_v_seq else v, torch.stack(charged)


@register_decomposition("sj_qif::forward")
def quadratic(x, v, tau, rest, critical, a0, threshold, v_reset, detach, alpha, store_v_seq=True, surrogate_id=0):  # type: ignore[no-untyped-def]
    """h = v + (x + a0*(v - rest)*(v - critical))/tau"""

    def charge(v, x):  # type: ignore[no-untyped-def]
        return v + (x.float() + a0 * (v - rest) * (v - critical)) / tau

    spikes, potentials, charged = over_time(x, v, charge, threshold, v_reset, detach, alpha, surrogate_id)
    return spikes, stored(potentials, store_v_seq), charged, before(v, potentials)


@register_decomposition("sj_eif::forward")
def exponential(x, v, tau, rest, theta, delta, threshold, v_reset, detach, alpha, store_v_seq=True, surrogate_id=0):  # type: ignore[no-untyped-def]
    """h = v + (x + rest - v + delta*exp((v - theta)/delta))/tau"""

    def charge(v, x):  # type: ignore[no-untyped-def]
        return v + (x.float() + rest - v + delta * torch.exp((v - theta) / delta)) / tau

    spikes, potentials, charged = over_time(x, v, charge, threshold, v_reset, detach, alpha, surrogate_id)
    return spikes, stored(potentials, store_v_seq), charged, before(v, potentials)


@register_decomposition("sj_izhikevich::forward")
def izhikevich(  # type: ignore[no-untyped-def]
    x, v, w, tau, rest, critical, a0, a, b, tau_w, threshold, v_reset, detach, alpha, store_v_seq=True, surrogate_id=0
):
    """h = v + (x + a0*(v - rest)*(v - critical) - w)/tau; w = w + (a*(h - rest) - w)/tau_w + b*s"""
    spikes, potentials, recoveries, charged, previous = [], [], [], [], []
    for t in range(x.shape[0]):
        previous.append(v)
        h = v + (x[t].float() + a0 * (v - rest) * (v - critical) - w) / tau
        s = SPIKES[surrogate_id](h - threshold, alpha)
        w = w + (a * (h - rest) - w) / tau_w + b * s
        v = reset(h, s, threshold, v_reset, detach)
        spikes.append(s.to(x.dtype))
        potentials.append(v)
        recoveries.append(w)
        charged.append(h)
    last = (torch.stack(potentials), torch.stack(recoveries)) if store_v_seq else (v, w)
    return torch.stack(spikes), *last, torch.stack(charged), torch.stack(previous)

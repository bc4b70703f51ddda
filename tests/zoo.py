"""The zoo: every neuron and loop style under test, as plain functions of tensors.

An entry is a `Case`: a function, how to make its inputs, and what the compiler must make of it. Each case runs on each
target against eager (`tests/test_zoo.py`): forward bit for bit, gradients of everything that wants one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ------------------------------------------------------------------------------------------------------------ surrogates


class Sigmoid(torch.autograd.Function):
    """The form most libraries use: alpha on the context."""

    @staticmethod
    def forward(ctx, x, alpha):
        ctx.save_for_backward(x)
        ctx.alpha = alpha
        return (x >= 0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(ctx.alpha * x)
        return grad * s * (1.0 - s) * ctx.alpha, None


class ATan(torch.autograd.Function):
    """``setup_context`` style."""

    @staticmethod
    def forward(x, alpha):
        return (x > 0).to(x.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, alpha = inputs
        ctx.save_for_backward(x)
        ctx.alpha = alpha

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (ctx.alpha / 2) / (1 + (torch.pi / 2 * ctx.alpha * x).pow(2)), None


class Quantised(torch.autograd.Function):
    """Whole numbers of spikes up to `most`; the gradient is written over where they are clipped."""

    @staticmethod
    def forward(ctx, x, most):
        ctx.save_for_backward(x)
        ctx.most = most
        return torch.round(torch.clamp(x, 0, most))

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        grad = grad.clone()
        grad[x < 0] = 0
        grad[x > ctx.most] = 0
        return grad, None


class FilledIn(torch.autograd.Function):
    """Spikes written through a mask into a tensor of zeros, as in the SpyTorch notebooks and what was copied from them."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        out = torch.zeros_like(x)
        out[x > 0] = 1.0
        return out

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad.clone() / (10.0 * x.abs() + 1.0) ** 2


class FiresAndResets(torch.autograd.Function):
    """Two results, of which a loop may read the second in some steps only."""

    @staticmethod
    def forward(ctx, v, threshold):
        ctx.save_for_backward(v - threshold)
        spike = (v > threshold).to(v.dtype)
        return spike, v - spike * threshold

    @staticmethod
    def backward(ctx, spike_grad, rest_grad):
        (u,) = ctx.saved_tensors
        return spike_grad / (1.0 + u * u) + rest_grad, None


class LearnableAlpha(torch.autograd.Function):
    """Several saved tensors and a gradient for alpha."""

    @staticmethod
    def forward(ctx, x, alpha):
        spike = (x >= 0).to(x.dtype)
        ctx.save_for_backward(x, alpha, spike)
        return spike

    @staticmethod
    def backward(ctx, grad):
        x, alpha, spike = ctx.saved_tensors
        s = torch.sigmoid(alpha * x)
        ds = grad * s * (1 - s)
        return ds * alpha, (ds * x).sum() + 0 * spike.sum()


def triangle(x: Tensor) -> Tensor:
    """Straight-through: a hard forward, a soft backward, by `detach`."""
    soft = torch.clamp(1 - x.abs(), min=0) * x
    return soft + ((x >= 0).to(x.dtype) - soft).detach()


# ------------------------------------------------------------------------------------------------------------------ cases


@dataclass(frozen=True)
class Case:
    name: str
    function: Callable[..., object]
    #: ``inputs(T) -> list of tensors``; floating ones want a gradient
    inputs: Callable[[int], list[Tensor]]
    #: loops that must become `Loop`s, recurrences that must be lowered
    loops: int = 1
    recurrences: int = 1
    #: recurrences that must become programs of kernels and calls
    stepped: int = 0
    #: whether each recurrence must have all steps: none is peeled
    unpeeled: bool = False
    #: forward tolerance where a transcendental stands in the charge; 0: bit for bit
    atol: float = 0.0


CASES: dict[str, Case] = {}


def randn(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape) * scale


def case(*shapes: tuple[int, ...], **kw):
    """Register a function whose first input is ``[T, *shapes[0]]`` and whose others are parameters of these shapes."""

    def register(function):
        first, rest = shapes[0] if shapes else (6, 7), shapes[1:]

        def inputs(steps: int) -> list[Tensor]:
            return [randn(steps, *first) * 2, *(torch.rand(s) + 0.3 for s in rest)]

        make = kw.pop("inputs", inputs)
        CASES[function.__name__] = Case(function.__name__, function, make, **kw)
        return function

    return register


# ------------------------------------------------------------------------------------------------- the neurons, one style


@case()
def lif(x):
    v = torch.zeros_like(x[0])
    out = []
    for t in range(x.shape[0]):
        h = v + (x[t] - v) / 2.0
        s = Sigmoid.apply(h - 1.0, 4.0)
        v = h * (1.0 - s)
        out.append(s)
    return torch.stack(out)


@case()
def filled_in(x):
    v = i = torch.zeros_like(x[0])
    out = []
    for t in range(x.shape[0]):
        s = FilledIn.apply(v - 1.0)
        v, i = (0.9 * v + i) * (1.0 - s.detach()), 0.8 * i + x[t]
        out.append(s)
    return torch.stack(out)


@case((6, 7), (7,))
def second_result_read_at_both_ends(x, threshold):
    v = torch.zeros_like(x[0])
    spikes, ends = [], []
    for t in range(x.shape[0]):
        v = 0.9 * v + x[t]
        s, rest = FiresAndResets.apply(v, threshold)
        v = v * (1.0 - s)
        spikes.append(s)
        if t in (0, x.shape[0] - 1):
            ends.append(rest)
    return torch.stack(spikes), torch.stack(ends)


@case((6, 7), ())
def reset_to_a_tensor(x, reset):
    v = torch.zeros_like(x[0])
    out = []
    for t in range(x.shape[0]):
        v = 0.9 * v + x[t]
        fired = v > 1.0
        v = v.masked_fill(fired, reset)
        out.append(fired.float() + v)
    return torch.stack(out)


@case()
def lif_soft_reset_detached_with_state(x):
    v = torch.zeros_like(x[0])
    out = []
    for t in range(x.shape[0]):
        v = 0.9 * v + x[t]
        s = ATan.apply(v - 1.0, 2.0)
        v = v - s.detach() * 1.0
        out.append(s)
    return torch.stack(out), v


@case((6, 7), ())
def parametric_lif(x, w):
    v = torch.zeros_like(x[0])
    out = []
    for t in range(x.shape[0]):
        v = v + (x[t] - v) * w.sigmoid()
        s = Sigmoid.apply(v - 1.0, 4.0)
        v = v * (1 - s)
        out.append(s)
    return torch.stack(out)


@case((3, 5, 4, 4), (5,), (5,))
def per_channel_threshold_and_decay(x, threshold, decay):
    v = torch.zeros_like(x[0])
    th, d = threshold.view(1, -1, 1, 1), decay.view(1, -1, 1, 1)
    out = []
    for t in range(x.shape[0]):
        v = v * d + x[t]
        s = Sigmoid.apply(v - th, 4.0)
        v = v - s * th
        out.append(s)
    return torch.stack(out), v


@case((3, 5, 4, 4), (5,))
def threshold_viewed_in_the_loop(x, threshold):
    v = torch.zeros_like(x[0])
    out = []
    for t in range(x.shape[0]):
        v = v * 0.5 + x[t]
        s = Sigmoid.apply(v - threshold.exp().view(1, -1, 1, 1), 4.0)
        v = v * (1 - s)
        out.append(s)
    return torch.stack(out)


@case((6, 7), ())
def learnable_alpha(x, alpha):
    v = torch.zeros_like(x[0])
    out = []
    for t in range(x.shape[0]):
        v = v * 0.5 + x[t]
        s = LearnableAlpha.apply(v - 0.5, alpha)
        v = v * (1 - s)
        out.append(s)
    return torch.stack(out)


@case()
def straight_through(x):
    v = torch.zeros_like(x[0])
    out = []
    for t in range(x.shape[0]):
        v = v * 0.5 + x[t]
        s = triangle(v - 0.7)
        with torch.no_grad():
            r = (s > 0.5).float() * 0.7
        v = v - r
        out.append(s)
    return torch.stack(out)


@case((6, 7), (7,), (7,))
def cuba_lif_two_states(x, c_decay, v_decay):
    c = torch.zeros_like(x[0])
    v = torch.zeros_like(x[0])
    out = []
    for t in range(x.shape[0]):
        c = c * c_decay + x[t]
        v = v * v_decay + c
        s = Sigmoid.apply(v - 1.0, 4.0)
        v = v * (1.0 - s)
        out.append(s)
    return torch.stack(out), c, v


@case()
def adaptive_threshold(x):
    v, b, z = torch.zeros_like(x[0]), torch.zeros_like(x[0]), torch.zeros_like(x[0])
    out = []
    for t in range(x.shape[0]):
        b = 0.9 * b + 0.1 * z
        v = 0.8 * v + x[t]
        z = Sigmoid.apply(v - (1.0 + 1.8 * b), 4.0)
        v = v - z * (1.0 + 1.8 * b)
        out.append(z)
    return torch.stack(out), b


@case()
def izhikevich(x):
    v, w = torch.full_like(x[0], -0.1), torch.zeros_like(x[0])
    out = []
    for t in range(x.shape[0]):
        h = v + (x[t] + 1.0 * (v - (-0.1)) * (v - 0.8) - w) / 10.0
        w = w + (0.02 * (h + 0.1) - w) / 20.0
        s = Sigmoid.apply(h - 1.0, 4.0)
        w = w + 0.3 * s
        v = s * -0.1 + (1.0 - s) * h
        out.append(s)
    return torch.stack(out), v, w


@case(atol=2e-6)
def exponential_integrate_and_fire(x):
    v = torch.zeros_like(x[0])
    vs = []
    for t in range(x.shape[0]):
        h = v + (x[t] - v + 0.5 * torch.exp((v - 0.8) / 0.5)) / 10.0
        s = (h >= 1.0).to(h)
        v = h * (1.0 - s)
        vs.append(v)
    return torch.stack(vs)


@case()
def snntorch_style(x):
    mem = torch.zeros(0)
    mem = torch.zeros_like(x[0])
    spikes, mems = [], []
    for step in range(x.shape[0]):
        reset = ATan.apply(mem - 1.0, 2.0).clone().detach()
        mem = 0.9 * mem + x[step] - reset * 1.0
        spk = ATan.apply(mem - 1.0, 2.0)
        spikes.append(spk)
        mems.append(mem)
    return torch.stack(spikes), torch.stack(mems)


@case()
def static_input_two_layers(x):
    """No step reads a slice of x, so that an iteration may begin anywhere; the last one lacks its dead tail."""
    current, steps = x[0], x.shape[0]
    m1, m2 = torch.zeros_like(current), torch.zeros_like(current)
    spikes, mems = [], []
    for _ in range(steps):
        reset = ATan.apply(m1 - 1.0, 2.0).clone().detach()
        m1 = 0.9 * m1 + current - reset * 1.0
        s1 = ATan.apply(m1 - 1.0, 2.0)
        reset = ATan.apply(m2 - 0.5, 2.0).clone().detach()
        m2 = 0.8 * m2 + 0.7 * s1 - reset * 0.5
        spikes.append(ATan.apply(m2 - 0.5, 2.0))
        mems.append(m2)
    return torch.stack(spikes), torch.stack(mems)


@case()
def norse_style(x):
    v = torch.zeros_like(x[0])
    i = torch.zeros_like(x[0])
    out = []
    for xt in x:
        i_jump = i + xt
        dv = 0.001 * 100.0 * ((0.0 - v) + i_jump)
        v_decayed = v + dv
        i = i_jump + -0.001 * 200.0 * i_jump
        z = Sigmoid.apply(v_decayed - 1.0, 4.0)
        v = (1 - z) * v_decayed + z * 0.0
        out.append(z)
    return torch.stack(out), v, i


@case()
def spikes_from_the_previous_membrane(x):
    mem, syn = torch.zeros_like(x[0]), torch.zeros_like(x[0])
    mem_rec, spk_rec = [], []
    for t in range(x.shape[0]):
        mthr = mem - 1.0
        out = Sigmoid.apply(mthr, 10.0)
        rst = torch.zeros_like(mem)
        c = mthr > 0
        rst = torch.where(c, torch.ones_like(mem), rst)
        new_syn = 0.8 * syn + x[t]
        new_mem = 0.9 * mem + syn - rst
        mem_rec.append(mem)
        spk_rec.append(out)
        mem, syn = new_mem, new_syn
    return torch.stack(mem_rec, dim=1), torch.stack(spk_rec, dim=1)


@case()
def bool_and_integer_states(x):
    v = torch.zeros_like(x[0])
    refractory = torch.zeros(x.shape[1:], dtype=torch.int64)
    fired = torch.zeros(x.shape[1:], dtype=torch.bool)
    out = []
    for t in range(x.shape[0]):
        active = refractory <= 0
        v = torch.where(active, v * 0.9 + x[t], v)
        s = Sigmoid.apply(v - 1.0, 4.0)
        fired = fired | (s > 0)
        refractory = torch.where(s > 0, torch.full_like(refractory, 2), refractory - 1)
        v = v * (1 - s)
        out.append(s)
    return torch.stack(out), fired, refractory


@case()
def masked_reset(x):
    v = torch.zeros_like(x[0])
    out = []
    for t in range(x.shape[0]):
        v = v * 0.5 + x[t]
        s = (v > 1.0).float()
        v = v.masked_fill(s.bool(), 0.0)
        out.append(v)
    return torch.stack(out)


@case()
def whole_spikes(x):
    v = torch.zeros_like(x[0])
    out = []
    for t in range(x.shape[0]):
        v = v * 0.25 + x[t] * 2.0
        s = Quantised.apply(v, 4)
        v = v - s
        out.append(s)
    return torch.stack(out)


@case()
def three_writes(x):
    """An operator, a method and a mask write into one tensor."""
    v = torch.zeros_like(x[0])
    out = []
    for t in range(x.shape[0]):
        v = 0.9 * v
        v += x[t]
        s = Sigmoid.apply(v - 1.0, 4.0)
        v.masked_fill_(s.detach().bool(), 0.0)
        v[v < -1.0] = -1.0
        out.append(s)
    return torch.stack(out), v


@case(inputs=lambda T: [randn(6, 7, T) * 2])
def buffer_read_back_time_last(x):
    """The output's last slice is what the reset reads."""
    u = torch.zeros_like(x[..., 0])
    out = torch.zeros_like(x)
    for t in range(x.shape[-1]):
        u = 0.5 * u * (1 - out[..., max(t - 1, 0)]) + x[..., t]
        out[..., t] = Sigmoid.apply(u - 1.0, 4.0)
    return out


# ---------------------------------------------------------------------------------------------------------- loop styles


def _step(v, x):
    h = v + (x - v) / 2.0
    s = Sigmoid.apply(h - 1.0, 4.0)
    return h * (1.0 - s), s


@case()
def iterate_the_tensor(x):
    v, out = torch.zeros_like(x[0]), []
    for xt in x:
        v, s = _step(v, xt)
        out.append(s)
    return torch.stack(out)


@case()
def unbind(x):
    v, out = torch.zeros_like(x[0]), []
    for xt in x.unbind(0):
        v, s = _step(v, xt)
        out.append(s)
    return torch.stack(out)


@case(inputs=lambda T: [randn(6, T, 7) * 2])
def time_at_dim_1(x):
    v, out = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        v, s = _step(v, x[:, t])
        out.append(s)
    return torch.stack(out, dim=1)


@case(inputs=lambda T: [randn(6, 7, T) * 2])
def time_last(x):
    v, out = torch.zeros_like(x[..., 0]), []
    for t in range(x.shape[-1]):
        v, s = _step(v, x[..., t])
        out.append(s)
    return torch.stack(out, dim=-1)


@case(inputs=lambda T: [randn(6, T, 7) * 2])
def unbind_dim_1(x):
    v, out = torch.zeros(6, 7), []
    for xt in torch.unbind(x, dim=1):
        v, s = _step(v, xt)
        out.append(s)
    return torch.stack(out, 1)


@case()
def scalar_start(x):
    v, out = 0.0, []
    for t in range(x.shape[0]):
        v, s = _step(v, x[t])
        out.append(s)
    return torch.stack(out), v


@case()
def integer_zero_start(x):
    mem, out = 0, []
    for t in range(x.shape[0]):
        mem = mem * 0.25 + x[t]
        s = Sigmoid.apply(mem - 1.0, 4.0)
        mem = mem * (1 - s)
        out.append(s)
    return torch.stack(out)


@case()
def none_start(x):
    v, out = None, []
    for t in range(x.shape[0]):
        if v is None:
            v = torch.zeros_like(x[t])
        v, s = _step(v, x[t])
        out.append(s)
    return torch.stack(out)


@case()
def first_step_special(x):
    out = []
    for t in range(x.shape[0]):
        if t >= 1:
            mem = mem * 0.25 * (1 - s) + x[t]  # noqa: F821
        else:
            mem = x[t]
        s = Sigmoid.apply(mem - 1.0, 4.0)
        out.append(s)
    return torch.stack(out)


@case()
def last_step_special(x):
    v, out = torch.zeros_like(x[0]), []
    steps = x.shape[0]
    for t in range(steps):
        h = v * 0.5 + x[t]
        s = Sigmoid.apply(h - 1.0, 4.0)
        out.append(s)
        if t < steps - 1:
            v = h * (1 - s)
    return torch.stack(out)


@case()
def written_into_a_buffer(x):
    v, out = torch.zeros_like(x[0]), torch.empty_like(x)
    for t in range(x.shape[0]):
        v, s = _step(v, x[t])
        out[t] = s
    return out


@case(inputs=lambda T: [randn(6, T, 7) * 2])
def written_into_a_buffer_dim_1(x):
    v, out = torch.zeros_like(x[:, 0]), torch.zeros_like(x)
    for t in range(x.shape[1]):
        v, s = _step(v, x[:, t])
        out[:, t] = s
    return out


@case()
def buffer_longer_than_the_loop(x):
    v, out = torch.zeros_like(x[0]), torch.zeros(x.shape[0] + 2, *x.shape[1:])
    for t in range(x.shape[0]):
        v, s = _step(v, x[t])
        out[t + 1] = s
    return out


@case()
def buffer_read_back(x):
    v = torch.zeros_like(x)
    out = []
    for t in range(1, x.shape[0]):
        v[t] = v[t - 1] * 0.5 + x[t]
        out.append(Sigmoid.apply(v[t] - 1.0, 4.0))
    return torch.stack(out), v


@case()
def concatenated(x):
    v, out = torch.zeros_like(x[0]), []
    for t in range(x.shape[0]):
        v, s = _step(v, x[t])
        out.append(s.unsqueeze(0))
    return torch.cat(out, dim=0)


@case()
def steps_as_slices(x):
    v, out = torch.zeros_like(x[:1]), []
    for t in range(x.shape[0]):
        v, s = _step(v, x[t : t + 1])
        out.append(s)
    return torch.cat(out)


@case(inputs=lambda steps: [randn(3, steps, 4) * 2])
def steps_as_slices_batch_first(x):
    v, out = torch.zeros_like(x[:, :1]), []
    for t in range(x.shape[1]):
        v, s = _step(v, x[:, t : t + 1])
        out.append(s)
    return torch.cat(out, dim=1)


@case((6, 7), (), (), (), (), ())
def bounded_parameters(x, a, b, c, d, e):
    v, i, out = torch.zeros_like(x[0]), torch.zeros_like(x[0]), []
    for t in range(x.shape[0]):
        i = a.clamp(0, 1) * i + b.relu() * x[t]
        v = c.clamp(min=0.5) * torch.where(d > 0.9, d, 0.9) * v + i
        s = Sigmoid.apply(v - F.hardtanh(e, 0.2, 1.0), 4.0)
        v = v - s
        out.append(s)
    return torch.stack(out)


@case(atol=1e-5)
def batch_norm_after_a_first_step_that_differs(x):
    mean, var = torch.zeros(x.shape[-1]), torch.ones(x.shape[-1])
    v, out = 0.0, []
    for t in range(x.shape[0]):
        h = v * 0.5 + F.batch_norm(x[t], mean, var, training=True)
        s = Sigmoid.apply(h - 1.0, 4.0)
        v = h * (1.0 - s)
        out.append(s)
    return torch.stack(out), mean, var


@case()
def both_directions_in_one_loop(x):
    v, back, out, reverse = torch.zeros_like(x[0]), torch.zeros_like(x[0]), [], []
    for t in range(x.shape[0]):
        v, s = _step(v, x[t])
        out.append(s)
        back, s = _step(back, x[-1 - t])
        reverse.insert(0, s)
    return torch.stack(out) + torch.stack(reverse)


@case()
def rate_regularised_in_the_loop(x):
    v, loss, count = torch.zeros_like(x[0]), 0.0, 0.0
    for t in range(x.shape[0]):
        v, s = _step(v, x[t])
        loss = loss + (s.mean() - 0.1) ** 2
        count = count + s.sum(1)
    return count, loss


@case()
def running_maximum(x):
    v, highest = torch.zeros_like(x[0]), torch.full_like(x[0], -1.0)
    for t in range(x.shape[0]):
        v, _ = _step(v, x[t])
        highest = torch.maximum(highest, v)
    return highest


@case(inputs=lambda steps: [randn(steps, 4, 5) * 2, *(torch.rand(5) + 0.3 for _ in range(steps))])
def parameters_of_its_own_in_every_step(x, *weights):
    v, out = torch.zeros_like(x[0]), []
    for t in range(x.shape[0]):
        v, s = _step(v, x[t] * weights[t])
        out.append(s)
    return torch.stack(out)


@case()
def record_that_grows(x):
    v, record = torch.zeros_like(x[0]), None
    for t in range(x.shape[0]):
        v, s = _step(v, x[t])
        record = s.unsqueeze(0).clone() if record is None else torch.cat((record, s.unsqueeze(0)))
    return record


@case()
def records_started_empty(x):
    v, spikes, potentials = torch.zeros_like(x[0]), torch.empty(0, *x.shape[1:]), torch.tensor([])
    for t in range(x.shape[0]):
        v, s = _step(v, x[t])
        spikes = torch.cat([spikes, s[None]], dim=0)
        potentials = torch.cat([potentials, v.unsqueeze(0)], 0)
    return spikes, potentials


@case()
def accumulated(x):
    v, acc = torch.zeros_like(x[0]), torch.zeros_like(x[0])
    for t in range(x.shape[0]):
        v, s = _step(v, x[t])
        acc = acc + s
    return acc / x.shape[0]


@case()
def first_spikes_and_discounted_sum(x):
    v, acc, first = torch.zeros_like(x[0]), torch.zeros_like(x[0]), torch.full_like(x[0], x.shape[0])
    for t in range(x.shape[0]):
        v, s = _step(v, x[t])
        acc = acc + s * 0.9**t
        first = torch.where((s > 0) & (first == x.shape[0]), t, first)
    return acc, first


@case()
def two_populations(x):
    v, u, out = torch.zeros_like(x[0]), torch.zeros_like(x[0]), []
    for t in range(x.shape[0]):
        v, s = _step(v, x[t])
        u = 0.9 * u + x[t]
        out.append(s)
    return torch.stack(out), u


@case()
def accumulated_in_place(x):
    v, acc = torch.zeros_like(x[0]), 0
    for t in range(x.shape[0]):
        v, s = _step(v, x[t])
        acc += s
    return acc


@case()
def rate_readout(x):
    v, out = torch.zeros_like(x[0]), []
    for t in range(x.shape[0]):
        v, s = _step(v, x[t])
        out.append(s)
    return torch.stack(out).mean(0)


@case()
def summed_list(x):
    v, out = torch.zeros_like(x[0]), []
    for t in range(x.shape[0]):
        v, s = _step(v, x[t])
        out.append(s)
    return sum(out)


@case()
def used_one_by_one(x):
    v, out = torch.zeros_like(x[0]), []
    for t in range(x.shape[0]):
        v, s = _step(v, x[t])
        out.append(s)
    return out[0] * 2, out[-1] + out[1], torch.stack(out[1:])


@case(inputs=lambda T: [randn(6, 7) * 2])
def static_input(x):
    v, out = torch.zeros_like(x), []
    for _ in range(8):
        v, s = _step(v, x)
        out.append(s)
    return torch.stack(out)


@case()
def backwards_in_time(x):
    v, out = torch.zeros_like(x[0]), []
    for t in reversed(range(x.shape[0])):
        v, s = _step(v, x[t])
        out.append(s)
    return torch.stack(out)


@case()
def delayed_by_two(x):
    v, s1, s2, out = torch.zeros_like(x[0]), torch.zeros_like(x[0]), torch.ones_like(x[0]), []
    for t in range(x.shape[0]):
        v = v * 0.5 + x[t] - 0.3 * s2
        s = Sigmoid.apply(v - 1.0, 4.0)
        s2, s1 = s1, s
        out.append(s)
    return torch.stack(out)


@case()
def previous_input(x):
    v, out = torch.zeros_like(x[0]), []
    for t in range(1, x.shape[0]):
        v = v * 0.5 + x[t] - 0.2 * x[t - 1]
        s = Sigmoid.apply(v - 1.0, 4.0)
        v = v * (1 - s)
        out.append(s)
    return torch.stack(out)


@case(recurrences=2)
def two_loops(x):
    v, first = torch.zeros_like(x[0]), []
    for t in range(x.shape[0]):
        v, s = _step(v, x[t])
        first.append(s)
    y = torch.stack(first).flip(1)
    u, second = torch.zeros_like(y[0]), []
    for t in range(y.shape[0]):
        u = u * 0.9 + y[t]
        s = Sigmoid.apply(u - 1.0, 4.0)
        u = u - s
        second.append(s)
    return torch.stack(second)


@case()
def two_layers_in_one_loop(x):
    v, u, out = torch.zeros_like(x[0]), torch.zeros_like(x[0]), []
    for t in range(x.shape[0]):
        v, s = _step(v, x[t])
        u = u * 0.9 + s * 0.7
        z = Sigmoid.apply(u - 1.0, 4.0)
        u = u - z
        out.append(z)
    return torch.stack(out)


@case()
def slots_of_one_tensor(x):
    states, out = torch.zeros(2, *x.shape[1:]), []
    for t in range(x.shape[0]):
        states[0], s = _step(states[0], x[t])
        states[1] += s * 0.7
        z = Sigmoid.apply(states[1] - 1.0, 4.0)
        states[1] = states[1] - z
        out.append(z)
    return torch.stack(out), states


@case()
def states_handed_on_in_one_tensor(x):
    packed, out = torch.zeros(x.shape[1], 2 * x.shape[2]), []
    for t in range(x.shape[0]):
        v, i = packed.chunk(2, dim=1)
        i = i * 0.8 + x[t]
        v, s = _step(v, i)
        packed = torch.cat([v, i], dim=1)
        out.append(s)
    return torch.stack(out), packed


@case((4, 6), (5, 6), (3, 5), recurrences=2)
def linear_layers_in_the_loop(x, w1, w2):
    v, u, out = torch.zeros(4, 5), torch.zeros(4, 3), []
    for t in range(x.shape[0]):
        v, s = _step(v, nn.functional.linear(x[t], w1))
        u, z = _step(u, nn.functional.linear(s, w2))
        out.append(z)
    return torch.stack(out)


@case((4, 6), (5, 6), (3, 5), recurrences=2, inputs=lambda T: [randn(4, 6), torch.rand(5, 6), torch.rand(3, 5)])
def static_network(x, w1, w2):
    v, u, count = torch.zeros(4, 5), torch.zeros(4, 3), 0.0
    for _ in range(7):
        v, s = _step(v, nn.functional.linear(x, w1))
        u, z = _step(u, nn.functional.linear(s, w2))
        count = count + z
    return count


@case((6, 7), (1,))
def state_that_starts_broadcastable(x, v0):
    v, out = v0, []
    for t in range(x.shape[0]):
        v, s = _step(v, x[t])
        out.append(s)
    return torch.stack(out)


@case((6, 7), (6, 7))
def state_passed_in(x, v0):
    v, out = v0, []
    for t in range(x.shape[0]):
        v, s = _step(v, x[t])
        out.append(s)
    return torch.stack(out), v


@case((6, 7), (6, 7), (6, 7), unpeeled=True)
def spikes_fed_back_to_the_input(x, v0, s0):
    """Every read of x is made before the loop, and the last iteration has no next read: none may be made up for it."""
    v, s, out = v0, s0, []
    for x_t in x.unbind(0):
        v, s = _step(v, x_t + 0.5 * s)
        out.append(s)
    return torch.stack(out), s, v


@case((4, 6), (5, 6), (4, 5), unpeeled=True)
def layer_before_a_state_passed_in(x, w, v0):
    v, out = v0, []
    for x_t in x.unbind(0):
        v, s = _step(v, nn.functional.linear(x_t, w))
        out.append(s)
    return torch.stack(out), v


@case((6, 7), (6, 7), unpeeled=True)
def state_checked_in_python(x, v0):
    """What a neuron with a state of its own does in its first step."""
    v, out = v0, []
    for t in range(x.shape[0]):
        current = x[t] * 0.5
        if t == 0 and v.shape != x[t].shape:
            raise ValueError("the state is of another shape")
        v, s = _step(v, current)
        out.append(s)
    return torch.stack(out), v


@case((6, 7))
def states_of_different_shapes(x):
    v, trace, out = torch.zeros_like(x[0]), torch.ones(1), []
    for t in range(x.shape[0]):
        trace = trace * 0.9
        v = v * 0.5 + x[t] * trace
        s = Sigmoid.apply(v - 1.0, 4.0)
        v = v * (1 - s)
        out.append(s)
    return torch.stack(out), trace


@case((6, 7), (7,), (7,))
def affine_input(x, gain, bias):
    v, out = torch.zeros_like(x[0]), []
    for t in range(x.shape[0]):
        v, s = _step(v, x[t] * gain + bias)
        out.append(s * 2.0)
    return torch.stack(out)


# ------------------------------------------------------------------------------- recurrences that are more than pointwise


@case((5, 6), (7, 6), (7, 7), (7,), recurrences=0, stepped=1, unpeeled=True)
def recurrent_lif(x, w_in, w, b):
    v = s = x.new_zeros(5, 7)
    out = []
    for t in range(x.shape[0]):
        v, s = _step(v, nn.functional.linear(x[t], w_in) + nn.functional.linear(s, w, b) * 0.3)
        out.append(s)
    return torch.stack(out)


@case((5, 6), (6, 6), (5, 6), recurrences=0, stepped=1)
def recurrent_states_returned(x, w, v0):
    v = s = v0
    out = []
    for x_t in x.unbind(0):
        v, s = _step(v, x_t + s @ w)
        out.append(v)
    return torch.stack(out, -1), s, v


@case((5, 6), (4, 6), (6, 4), recurrences=0, stepped=1)
def feedback_from_the_second_layer(x, w1, w2):
    v, u, z = torch.zeros(5, 4), torch.zeros(5, 6), torch.zeros(5, 6)
    out = []
    for t in range(x.shape[0]):
        v, s = _step(v, (x[t] - 0.5 * z) @ w1.t())
        u, z = _step(u, s @ w2.t())
        out.append(z)
    return torch.stack(out)


@case((2, 3, 5, 5), (3, 3, 3, 3), recurrences=0, stepped=1)
def recurrent_convolution(x, w):
    v = s = torch.zeros(2, 3, 5, 5)
    out = []
    for t in range(x.shape[0]):
        v, s = _step(v, x[t] + nn.functional.conv2d(s, w, padding=1) * 0.2)
        out.append(s)
    return torch.stack(out)


@case((5, 6), (6, 1, 3), (6,), recurrences=0, stepped=1)
def grouped_convolution_of_the_spikes(x, w, b):
    v, feedback, out = torch.zeros(5, 6), torch.zeros(5, 6), []
    for t in range(x.shape[0]):
        v, s = _step(v, x[t] + feedback)
        feedback = nn.functional.conv1d(s.view(-1, 2, 3), w, b, groups=2).view(-1, 6)
        out.append(s)
    return torch.stack(out)


@case((5, 6), (4, 10), (4,), recurrences=0, stepped=1)
def concatenated_with_the_spikes(x, w, b):
    v, s, out = torch.zeros(5, 4), torch.zeros(5, 4), []
    for t in range(x.shape[0]):
        v, s = _step(v, nn.functional.linear(torch.cat((x[t], s), dim=-1), w, b))
        out.append(s)
    return torch.stack(out)


@case((6, 7), recurrences=0, stepped=1)
def reduction_of_the_state(x):
    v, out = torch.zeros_like(x[0]), []
    for t in range(x.shape[0]):
        v = v - v.mean(dim=0, keepdim=True) + x[t]
        out.append(v)
    return torch.stack(out)


@case((6, 7), (7,), (7,), recurrences=0, stepped=1)
def normalised_potential(x, gain, bias):
    v, out = torch.zeros_like(x[0]), []
    for t in range(x.shape[0]):
        v, s = _step(nn.functional.layer_norm(v + x[t], (7,), gain, bias), x[t])
        out.append(s)
    return torch.stack(out)


@case((5, 6), (12, 6), (12, 3), recurrences=0, stepped=1)
def lstm_written_out(x, w, u):
    h, c, out = torch.zeros(5, 3), torch.zeros(5, 3), []
    for t in range(x.shape[0]):
        i, f, g, o = (x[t] @ w.t() + h @ u.t()).chunk(4, -1)
        c = f * 0.5 * c + i * g
        h = o * c.clamp(-1.0, 1.0)
        out.append(h)
    return torch.stack(out)


@case((5, 6), (6, 6), recurrences=0, stepped=1)
def states_of_a_recurrent_layer_that_start_as_numbers(x, w):
    v, s, out = torch.zeros(()), torch.zeros(5, 6), []
    for t in range(x.shape[0]):
        v, s = _step(v, x[t] + s @ w)
        out.append(s)
    return torch.stack(out)


@case(recurrences=0, stepped=1, inputs=lambda T: [randn(T, 5, 6), torch.rand(6, 6), torch.rand(6, 5).t()])
def recurrent_state_of_another_layout(x, w, v0):
    v, s, out = v0, torch.zeros(5, 6), []
    for t in range(x.shape[0]):
        v, s = _step(v, x[t] + s @ w)
        out.append(s)
    return torch.stack(out)


@case((5, 6), recurrences=0, stepped=1)
def winner_takes_all(x):
    v, out = torch.zeros(5, 6), []
    for t in range(x.shape[0]):
        h = 0.9 * v + x[t]
        s = (h == h.amax(-1, keepdim=True)).float() * Sigmoid.apply(h - 1.0, 4.0)
        v = h - s
        out.append(s)
    return torch.stack(out)


@case((6, 6), recurrences=0, stepped=1, inputs=lambda T: [randn(T, 6, 6) * 0.3, randn(6, 6) * 0.3])
def recurrent_backwards_in_time(x, w):
    v, out = torch.zeros(6, 6), torch.zeros(x.shape)
    for t in range(x.shape[0] - 1, -1, -1):
        v = (v @ w + x[t]).clamp(-2.0, 2.0)
        out[t] = v
    return out


@case((5, 6), (6, 6), recurrences=0, stepped=1)
def recurrent_sum_of_spikes(x, w):
    v, s, count = torch.zeros(5, 6), torch.zeros(5, 6), 0.0
    for t in range(x.shape[0]):
        v, s = _step(v, x[t] + s @ w)
        count = count + s
    return count


@case((5, 6), (6, 6), (6,), recurrences=0, stepped=1)
def value_that_no_step_changes(x, w, a):
    v, out = torch.zeros(5, 6), []
    for t in range(x.shape[0]):
        threshold = torch.sigmoid(a)
        v, s = _step(v, x[t] + v @ w * 0.1)
        out.append(s * threshold + torch.zeros(5, 6))
        out.append(threshold.expand(5, 6))
    return torch.stack(out)


@case((6, 7), (6, 7))
def only_the_first_step_wants_a_gradient(x, v0):
    """The state depends on a parameter in the first step and on nothing that wants a gradient in all others."""
    v, total = v0, 0.0
    for t in range(x.shape[0]):
        total = total + 2.0 * v
        v = torch.relu(x[t]).detach() + 0.0 * v.detach()
    return total


# ---------------------------------------------------------------------------------------------------- memory and layout


@case()
def two_records_through_views(x):
    spikes, potentials = torch.zeros_like(x), torch.zeros_like(x)
    v = torch.zeros_like(x[0])
    for t in range(x.shape[0]):
        v, s = _step(v, x[t])
        spikes[t].copy_(s)
        potentials[t].copy_(v)
    return spikes * 1.0, potentials * 1.0


@case()
def scratch_written_through_a_view(x):
    v, spikes, masks = torch.zeros_like(x[0]), [], []
    for t in range(x.shape[0]):
        v, s = _step(v, x[t])
        mask = torch.ones(x.shape[1:])
        mask[:, :2].mul_(x[t, :, :2].detach())
        spikes.append(s)
        masks.append(mask)
    return torch.stack(spikes), torch.stack(masks)


@case()
def number_that_grows_by_tensors_of_zeros(x):
    v, count, out = 0.0, 0.0, []
    for t in range(x.shape[0]):
        v, s = _step(v, x[t])
        count = count + torch.zeros_like(x[t])
        out.append(s)
    return torch.stack(out), count


@case()
def steps_of_the_input_detached(x):
    v, spikes, kept = torch.zeros_like(x[0]), [], []
    for t in range(x.shape[0]):
        v, s = _step(v, x[t])
        spikes.append(s)
        kept.append(x[t].detach())
    return torch.stack(spikes), torch.stack(kept)


@case()
def parts_of_steps_stacked_and_viewed(x):
    v, parts = torch.zeros_like(x[0]), []
    for t in range(x.shape[0]):
        v, s = _step(v, x[t])
        parts.append(s[:, :2])
    return torch.stack(parts).view(-1)


@case()
def stacked_along_two_dims_and_viewed(x):
    v, out = torch.zeros_like(x[0]), []
    for t in range(x.shape[0]):
        v, s = _step(v, x[t])
        out.append(s)
    return torch.stack(out).view(-1), torch.stack(out[1:], -1).view(-1), out[2].view(-1)


@case(inputs=lambda T: [randn(T, 7, 6).transpose(1, 2) * 2, torch.rand(6, 7)])
def last_state_of_a_transposed_series_viewed(x, v):
    out = []
    for t in range(x.shape[0]):
        v, s = _step(v, x[t])
        out.append(s)
    return torch.stack(out), v.view(-1)


@case()
def detached_spikes_that_are_filled_in(x):
    v, out = torch.zeros_like(x[0]), []
    for t in range(x.shape[0]):
        v = 0.9 * v + x[t]
        v = v * (1.0 - FilledIn.apply(v - 1.0).detach())
        out.append(v)
        FilledIn.apply(v - 2.0)
    return torch.stack(out)


@case()
def backwards_beside_what_cannot_be_batched(x):
    v, spikes, counts = torch.zeros_like(x[0]), [], []
    for t in reversed(range(x.shape[0])):
        v, s = _step(v, x[t])
        spikes.append(s)
        counts.append(torch.histc(x[t].detach(), 5))
    return torch.stack(spikes), torch.stack(counts)


@case((6, 7), (7,))
def a_record_that_is_read_after_another_is_scaled(x, bias):
    """The loop writes into one buffer; the product that could join it stands behind what reads that buffer."""
    record, shifted = torch.zeros_like(x), torch.zeros_like(x)
    v = torch.zeros_like(x[0])
    for t in range(x.shape[0]):
        v, s = _step(v, x[t])
        record[t].copy_(s)
        shifted[t] = v + bias
    return record * 2.0, shifted * 2.0


@case()
def state_wrapped_into_a_series_of_one_step(x):
    """As layers for all steps do that are called with one."""
    y = v = torch.zeros_like(x[0])
    out = []
    for t in range(x.shape[0]):
        v, s = _step(v, (x[t] - y).unsqueeze(0)[0])
        (y,) = torch.stack([s])[None][0].unbind(0)
        out.append(y)
    return torch.stack(out)


@case()
def delays_that_start_from_values_of_their_own(x):
    v, out = torch.zeros_like(x[0]), []
    spikes, currents = [x[0] * 0.5, x[1] * 0.0, x[2]], [x[1], x[0]]
    for t in range(x.shape[0]):
        v, s = _step(v, x[t] - 0.5 * spikes[0] + 0.25 * spikes[1] + 0.5 * currents[0])
        spikes, currents = [*spikes[1:], s], [*currents[1:], v]
        out.append(s)
    return torch.stack(out)


@case()
def delay_line_moved_as_one_tensor(x):
    """With taps, and with what is left of it behind the last step."""
    v, line, out = torch.zeros_like(x[0]), torch.zeros(3, *x.shape[1:], dtype=x.dtype), []
    for t in range(x.shape[0]):
        v, s = _step(v, x[t] - 0.5 * line[-1] + 0.25 * line[0])
        line = torch.cat([s[None], line[:-1]])
        out.append(s)
    return torch.stack(out), line


@case()
def delay_line_rolled_along_the_last_dim(x):
    v, line, out = torch.zeros_like(x[0]), torch.zeros(*x.shape[1:], 3, dtype=x.dtype), []
    for t in range(x.shape[0]):
        line = torch.roll(line, 1, -1)
        line[..., 0] = x[t]
        v, s = _step(v, line[..., -1])
        out.append(s)
    return torch.stack(out)


@case()
def record_by_select_scatter(x):
    v, out = torch.zeros_like(x[0]), torch.zeros_like(x)
    for t in range(x.shape[0]):
        v, s = _step(v, x[t])
        out = torch.select_scatter(out, s, 0, t)
    return out

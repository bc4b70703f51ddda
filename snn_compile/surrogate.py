"""Surrogate gradients: a step function forward, a chosen slope backward.

    forward   s = H(x) = (x >= 0), in the dtype of x          x = h - v_threshold
    backward  ds/dx = gradient(x)                              the derivative of primitive(x) where that has one

Each surrogate below is one class: `primitive_function` is the smooth function it stands for, `gradient` the slope used
in the backward pass. `spiking=False` makes the primitive itself the forward, which autograd then differentiates.

To add a surrogate, write the two static methods; no registration is needed, in the user's code either:

    class Triangle(SurrogateFunctionBase):
        def __init__(self, alpha: float = 1.0, spiking: bool = True):
            super().__init__(spiking, alpha=positive("alpha", alpha))

        @staticmethod
        def gradient(x, alpha):
            return alpha * torch.relu(1 - x.abs())

Why `allow_in_graph`: Dynamo speculates forward and backward of an `autograd.Function` at every call, which costs
it 20 ms a time step. Marked `allow_in_graph`, the call is one node that AOTAutograd traces through and costs well under
1 ms; the gradient is the same. docs/library.md has the measurement.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

__all__ = [
    "S2NN",
    "ATan",
    "DeterministicPass",
    "Erf",
    "FakeNumericalGradient",
    "LeakyKReLU",
    "LogTailedReLU",
    "MultiLevelSpikeCount",
    "NonzeroSignLogAbs",
    "PiecewiseExp",
    "PiecewiseLeakyReLU",
    "PiecewiseQuadratic",
    "PoissonPass",
    "QPseudoSpike",
    "Rect",
    "Sigmoid",
    "SoftSign",
    "SquarewaveFourierSeries",
    "SuperSpike",
    "SurrogateFunctionBase",
    "heaviside",
]


def heaviside(x: Tensor) -> Tensor:
    """1 where x >= 0, else 0, in the dtype of x."""
    return (x >= 0).to(x.dtype)


def positive(name: str, value: float) -> float:
    """`value`, or a ValueError that names the argument where it is not greater than 0."""
    return above(name, value, 0)


def above(name: str, value: float, bound: float) -> float:
    """`value`, or a ValueError that names the argument where it is not greater than `bound`."""
    if not value > bound:
        raise ValueError(f"{name} must be greater than {bound}, but is {value!r}")
    return value


class _Spike(torch.autograd.Function):
    """The surrogate `cls`: its `step` forward, its `gradient` backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, cls, *parameters):
        return cls.step(x, *parameters)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.cls, *ctx.parameters = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * ctx.cls.gradient(x, *ctx.parameters), None, *(None for _ in ctx.parameters)


def _spiking_function(cls):
    """The surrogate as a function `spike(x, *parameters)` that Dynamo keeps as one node."""

    def spike(x, *parameters):
        return _Spike.apply(x, cls, *parameters)

    spike.__name__ = f"{cls.__name__.lower()}_spike"
    spike.__qualname__ = f"{cls.__qualname__}.spiking_function"
    spike.__module__ = cls.__module__
    spike.__doc__ = f"Spikes of `{cls.__name__}`: its `step` forward, its `gradient` backward."
    return torch.compiler.allow_in_graph(spike)


class SurrogateFunctionBase(nn.Module):
    """A step function with a surrogate gradient.

    A subclass gives `gradient(x, *parameters)` and, where there is one, `primitive_function(x, *parameters)`; the
    parameters are Python numbers, in the order in which they are handed to this constructor.

    Args:
        spiking: True, the forward is the step; False, the forward is the primitive.

    Shapes: any tensor of floating point -> the same shape and dtype.
    Raises: ValueError where `spiking` is False and the surrogate has no primitive.
    """

    #: `spiking_function(x, *parameters)`: the spikes, with their surrogate gradient, as one node of a traced graph
    spiking_function: ClassVar[Callable[..., Tensor]]

    def __init__(self, spiking: bool = True, **parameters: float):
        super().__init__()
        self._arguments: tuple[Any, ...] = ()
        self._parameter_names = tuple(parameters)
        for name, value in parameters.items():
            setattr(self, name, value)
        self.set_spiking_mode(spiking)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in self.__dict__.get("_parameter_names", ()):  # forward hands them over as one tuple: cheap to trace
            self._arguments = tuple(getattr(self, name, None) for name in self._parameter_names)

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.spiking_function = staticmethod(_spiking_function(cls))

    @staticmethod
    def step(x: Tensor, *parameters) -> Tensor:
        """The forward in spiking mode."""
        return heaviside(x)

    @staticmethod
    def gradient(x: Tensor, *parameters) -> Tensor:
        """The slope used in the backward pass."""
        raise NotImplementedError("a surrogate needs gradient(x, *parameters)")

    @staticmethod
    def primitive_function(x: Tensor, *parameters) -> Tensor:
        """The smooth function whose derivative is `gradient`."""
        raise NotImplementedError("this surrogate is defined by its gradient alone; it has no primitive")

    def set_spiking_mode(self, spiking: bool) -> None:
        """Choose the forward: the step (True) or the primitive (False)."""
        if not spiking and type(self).primitive_function is SurrogateFunctionBase.primitive_function:
            name = type(self).__name__
            raise ValueError(f"spiking must be True for {name}, but is {spiking!r}: {name} has no primitive")
        self.spiking = spiking

    def forward(self, x: Tensor) -> Tensor:
        if self.spiking:
            return self.spiking_function(x, *self._arguments)
        return self.primitive_function(x, *self._arguments)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)}" for name in (*self._parameter_names, "spiking"))


class PiecewiseQuadratic(SurrogateFunctionBase):
    r"""A parabola on each side of 0, flat beyond 1/alpha.

    :math:`g'(x) = \alpha - \alpha^2 |x|` for :math:`|x| \le 1/\alpha`, else 0.
    Paper: Esser et al., "Convolutional networks for fast, energy-efficient neuromorphic computing", PNAS 2016.
    """

    def __init__(self, alpha: float = 1.0, spiking: bool = True):
        super().__init__(spiking, alpha=positive("alpha", alpha))

    @staticmethod
    def primitive_function(x, alpha):
        inside = -(alpha**2) / 2 * x * x.abs() + alpha * x + 0.5
        return torch.where(x.abs() <= 1 / alpha, inside, (x > 0).to(x.dtype))

    @staticmethod
    def gradient(x, alpha):
        return torch.where(x.abs() <= 1 / alpha, alpha - alpha**2 * x.abs(), 0.0)


class PiecewiseExp(SurrogateFunctionBase):
    r"""An exponential on each side of 0: :math:`g'(x) = \frac{\alpha}{2} e^{-\alpha |x|}`.

    Paper: Shrestha and Orchard, "SLAYER: spike layer error reassignment in time", arXiv 1810.08646.
    """

    def __init__(self, alpha: float = 1.0, spiking: bool = True):
        super().__init__(spiking, alpha=positive("alpha", alpha))

    @staticmethod
    def primitive_function(x, alpha):
        tail = torch.exp(-alpha * x.abs()) / 2
        return torch.where(x < 0, tail, 1 - tail)

    @staticmethod
    def gradient(x, alpha):
        return alpha / 2 * torch.exp(-alpha * x.abs())


class Sigmoid(SurrogateFunctionBase):
    r"""The logistic function: :math:`g(x) = \sigma(\alpha x)`,
    :math:`g'(x) = \alpha\,\sigma(\alpha x)(1 - \sigma(\alpha x))`.

    Paper: Zenke and Vogels, "The remarkable robustness of surrogate gradient learning", Neural Computation 2021.
    """

    def __init__(self, alpha: float = 4.0, spiking: bool = True):
        super().__init__(spiking, alpha=positive("alpha", alpha))

    @staticmethod
    def primitive_function(x, alpha):
        return torch.sigmoid(alpha * x)

    @staticmethod
    def gradient(x, alpha):
        s = torch.sigmoid(alpha * x)
        return (1 - s) * s * alpha


class SoftSign(SurrogateFunctionBase):
    r""":math:`g(x) = \frac12\left(\frac{\alpha x}{1 + |\alpha x|} + 1\right)`,
    :math:`g'(x) = \frac{1}{2\alpha(1/\alpha + |x|)^2}`.

    Paper: Zenke and Ganguli, "SuperSpike", Neural Computation 2018 (arXiv 1705.11146).
    """

    def __init__(self, alpha: float = 2.0, spiking: bool = True):
        super().__init__(spiking, alpha=positive("alpha", alpha))

    @staticmethod
    def primitive_function(x, alpha):
        return (alpha * x / (1 + (alpha * x).abs()) + 1) / 2

    @staticmethod
    def gradient(x, alpha):
        reach = 1 / alpha + x.abs()
        return 1 / (2 * alpha * (reach * reach))


class SuperSpike(SurrogateFunctionBase):
    r"""Defined by its gradient alone: :math:`g'(x) = \frac{\alpha}{(1 + |x|)^2}`.

    Paper: Zenke and Ganguli, "SuperSpike", Neural Computation 2018 (arXiv 1705.11146).
    """

    def __init__(self, alpha: float = 1.0, spiking: bool = True):
        super().__init__(spiking, alpha=positive("alpha", alpha))

    @staticmethod
    def gradient(x, alpha):
        reach = x.abs() + 1
        return alpha / (reach * reach)


class ATan(SurrogateFunctionBase):
    r""":math:`g(x) = \frac1\pi \arctan(\frac\pi2\alpha x) + \frac12`,
    :math:`g'(x) = \frac{\alpha/2}{1 + (\frac\pi2\alpha x)^2}`.

    Paper: Fang et al., "Incorporating learnable membrane time constant", ICCV 2021 (arXiv 2007.05785).
    """

    def __init__(self, alpha: float = 2.0, spiking: bool = True):
        super().__init__(spiking, alpha=positive("alpha", alpha))

    @staticmethod
    def primitive_function(x, alpha):
        return torch.atan(math.pi / 2 * alpha * x) / math.pi + 0.5

    @staticmethod
    def gradient(x, alpha):
        z = math.pi / 2 * alpha * x
        return alpha / 2 / (1 + z * z)


class NonzeroSignLogAbs(SurrogateFunctionBase):
    r""":math:`g(x) = \pm\log(\alpha|x| + 1)`, the sign that of x, + at 0; :math:`g'(x) = \frac{1}{1/\alpha + |x|}`."""

    def __init__(self, alpha: float = 1.0, spiking: bool = True):
        super().__init__(spiking, alpha=positive("alpha", alpha))

    @staticmethod
    def primitive_function(x, alpha):
        size = torch.log(alpha * x.abs() + 1)
        return torch.where(x >= 0, size, -size)

    @staticmethod
    def gradient(x, alpha):
        return 1 / (1 / alpha + x.abs())


class Erf(SurrogateFunctionBase):
    r"""The Gaussian error function: :math:`g(x) = \frac12\mathrm{erfc}(-\alpha x)`,
    :math:`g'(x) = \frac{\alpha}{\sqrt\pi} e^{-\alpha^2 x^2}`.

    Paper: Yin et al., "Effective and efficient computation with multiple-timescale SRNNs", ICONS 2020.
    """

    def __init__(self, alpha: float = 2.0, spiking: bool = True):
        super().__init__(spiking, alpha=positive("alpha", alpha))

    @staticmethod
    def primitive_function(x, alpha):
        return torch.erfc(-alpha * x) / 2

    @staticmethod
    def gradient(x, alpha):
        z = alpha * x
        return alpha / math.sqrt(math.pi) * torch.exp(-(z * z))


class PiecewiseLeakyReLU(SurrogateFunctionBase):
    r"""A ramp of width 2w with leaky ends: :math:`g'(x) = \frac{1}{2w}` for :math:`|x| < w`, else c.

    Paper: Wu et al., "Spatio-temporal backpropagation", Frontiers in Neuroscience 2018.
    """

    def __init__(self, w: float = 1.0, c: float = 0.01, spiking: bool = True):
        super().__init__(spiking, w=positive("w", w), c=c)

    @staticmethod
    def primitive_function(x, w, c):
        ramp = x / (2 * w) + 0.5
        return torch.where(x < -w, c * x + c * w, torch.where(x > w, c * x + (1 - c * w), ramp))

    @staticmethod
    def gradient(x, w, c):
        return torch.where(x.abs() < w, torch.full_like(x, 1 / (2 * w)), c)


class SquarewaveFourierSeries(SurrogateFunctionBase):
    r"""The first n - 1 terms of the Fourier series of a square wave of period P = `T_period`, with :math:`w = 2\pi/P`:
    :math:`g(x) = \frac12 + \frac2\pi\sum_{i=1}^{n-1} \frac{\sin((2i-1)wx)}{2i-1}`,
    :math:`g'(x) = \frac4P\sum_{i=1}^{n-1}\cos((2i-1)wx)`.
    """

    def __init__(self, n: int = 2, T_period: float = 8, spiking: bool = True):
        if not isinstance(n, int) or n < 2:
            raise ValueError(f"n must be an integer of at least 2, but is {n!r}")
        super().__init__(spiking, n=n, T_period=positive("T_period", T_period))

    @staticmethod
    def primitive_function(x, n, T_period):
        w = 2 * math.pi / T_period
        return 0.5 + 2 / math.pi * sum(torch.sin(k * w * x) / k for k in range(1, 2 * n - 2, 2))

    @staticmethod
    def gradient(x, n, T_period):
        w = 2 * math.pi / T_period
        return 4 / T_period * sum(torch.cos(k * w * x) for k in range(1, 2 * n - 2, 2))


class S2NN(SurrogateFunctionBase):
    r"""A sigmoid below 0 and a logarithm above: :math:`g'(x) = \alpha\,\sigma(\alpha x)(1-\sigma(\alpha x))` for
    :math:`x < 0`, else :math:`\frac{\beta}{x + 1}`.

    Paper: Suetake et al., "S2NN: time step reduction of spiking surrogate gradients", arXiv 2201.10879.
    """

    def __init__(self, alpha: float = 4.0, beta: float = 1.0, spiking: bool = True):
        super().__init__(spiking, alpha=positive("alpha", alpha), beta=positive("beta", beta))

    @staticmethod
    def primitive_function(x, alpha, beta):
        return torch.where(x < 0, torch.sigmoid(alpha * x), beta * torch.log((x + 1).abs() + 1e-5) + 0.5)

    @staticmethod
    def gradient(x, alpha, beta):
        s = torch.sigmoid(alpha * x)
        return torch.where(x < 0, alpha * s * (1 - s), beta / (x + 1))


class QPseudoSpike(SurrogateFunctionBase):
    r"""A heavy-tailed pseudo-derivative: :math:`g'(x) = \left(1 + \frac{2|x|}{\alpha - 1}\right)^{-\alpha}`, alpha > 1.

    Paper: Herranz-Celotti and Rouat, "Surrogate gradients design", arXiv 2202.00282.
    """

    def __init__(self, alpha: float = 2.0, spiking: bool = True):
        super().__init__(spiking, alpha=above("alpha", alpha, 1))

    @staticmethod
    def primitive_function(x, alpha):
        tail = (1 + 2 / (alpha - 1) * x.abs()) ** (1 - alpha) / 2
        return torch.where(x < 0, tail, 1 - tail)

    @staticmethod
    def gradient(x, alpha):
        return (1 + 2 / (alpha - 1) * x.abs()) ** -alpha


class LeakyKReLU(SurrogateFunctionBase):
    r""":math:`g(x) = k x` for :math:`x \ge 0`, else :math:`\mathrm{leak}\cdot x`; its gradient is k or leak."""

    def __init__(self, leak: float = 0.0, k: float = 1.0, spiking: bool = True):
        super().__init__(spiking, leak=leak, k=k)

    @staticmethod
    def primitive_function(x, leak, k):
        return torch.where(x >= 0, k * x, leak * x)

    @staticmethod
    def gradient(x, leak, k):
        return torch.where(x >= 0, torch.full_like(x, k), leak)


class FakeNumericalGradient(SurrogateFunctionBase):
    r"""Defined by its gradient alone: :math:`g'(x) = \min(\mathrm{sign}(x)/x,\ \alpha) = \min(1/|x|,\ \alpha)`.

    The gradient that numerical differentiation with a step of x would give, capped. At 0, of either sign, it is alpha.
    """

    def __init__(self, alpha: float = 0.3):
        super().__init__(True, alpha=positive("alpha", alpha))

    @staticmethod
    def gradient(x, alpha):
        return torch.clamp_max(1 / x.abs(), alpha)


class LogTailedReLU(SurrogateFunctionBase):
    r"""A leaky ReLU with a logarithmic tail: :math:`g'(x) = 1/x` for :math:`x > 1`, 1 for :math:`0 < x \le 1`, else
    alpha.

    Paper: Cai et al., "Deep learning with low precision by half-wave Gaussian quantization", CVPR 2017.
    """

    def __init__(self, alpha: float = 0.0, spiking: bool = True):
        super().__init__(spiking, alpha=alpha)

    @staticmethod
    def primitive_function(x, alpha):
        return torch.where(x > 1, torch.log(x.clamp_min(1)) + 1, torch.where(x > 0, x, alpha * x))

    @staticmethod
    def gradient(x, alpha):
        return torch.where(x > 0, 1 / x.clamp_min(1), alpha)


class Rect(SurrogateFunctionBase):
    r"""A rectangle: :math:`g(x) = \mathrm{clamp}(\alpha x + \frac12, 0, 1)`, :math:`g'(x) = \alpha` for
    :math:`|x| < \frac{1}{2\alpha}`, else 0.

    Paper: Wu et al., "Spatio-temporal backpropagation", Frontiers in Neuroscience 2018.
    """

    def __init__(self, alpha: float = 1.0, spiking: bool = True):
        super().__init__(spiking, alpha=positive("alpha", alpha))

    @staticmethod
    def primitive_function(x, alpha):
        return torch.clamp(alpha * x + 0.5, 0, 1)

    @staticmethod
    def gradient(x, alpha):
        return alpha * (x.abs() < 0.5 / alpha).to(x.dtype)


class DeterministicPass(SurrogateFunctionBase):
    """The straight-through estimator: the step forward, the identity backward; the primitive is x."""

    def __init__(self, spiking: bool = True):
        super().__init__(spiking)

    @staticmethod
    def primitive_function(x):
        return x

    @staticmethod
    def gradient(x):
        return torch.ones_like(x)


class PoissonPass(SurrogateFunctionBase):
    """A Bernoulli draw of probability x forward, the identity backward; x must lie in [0, 1]. The primitive is x."""

    def __init__(self, spiking: bool = True):
        super().__init__(spiking)

    @staticmethod
    def step(x):
        return torch.bernoulli(x)

    @staticmethod
    def primitive_function(x):
        return x

    @staticmethod
    def gradient(x):
        return torch.ones_like(x)


class MultiLevelSpikeCount(SurrogateFunctionBase):
    r"""The number of spikes a step can hold: :math:`\mathrm{round}(\mathrm{clamp}(x, 0, D))`, D = `max_spike_count`.

    The gradient is 1 where x lies in `grad_window` (both ends included), else 0; the primitive is clamp(x, 0, D).

    Args:
        max_spike_count: D, an integer of at least 1.
        grad_window: (low, high); None is (0, D).

    Paper: Luo et al., "Integer-valued training and spike-driven inference", ECCV 2024 (arXiv 2407.20708).
    """

    def __init__(self, max_spike_count: int, spiking: bool = True, grad_window: tuple[float, float] | None = None):
        if not isinstance(max_spike_count, int) or isinstance(max_spike_count, bool) or max_spike_count < 1:
            raise ValueError(f"max_spike_count must be an integer of at least 1, but is {max_spike_count!r}")
        low, high = (0.0, float(max_spike_count)) if grad_window is None else grad_window
        if low > high:
            raise ValueError(f"grad_window must be (low, high) with low <= high, but is {grad_window!r}")
        super().__init__(spiking, max_spike_count=max_spike_count, grad_min=low, grad_max=high)

    @staticmethod
    def step(x, max_spike_count, grad_min, grad_max):
        return torch.round(torch.clamp(x, 0, max_spike_count))

    @staticmethod
    def primitive_function(x, max_spike_count, grad_min, grad_max):
        return torch.clamp(x, 0, max_spike_count)

    @staticmethod
    def gradient(x, max_spike_count, grad_min, grad_max):
        return ((x >= grad_min) & (x <= grad_max)).to(x.dtype)

"""Dropout over time: one mask for all steps of a sequence, so that a dropped unit stays dropped."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snn_compile.neuron.checks import check_bool, check_count, check_probability, check_sequence
from snn_compile.neuron.stateful import StatefulModule, describe


class Dropout(StatefulModule):
    r"""Dropout whose mask is drawn at the first step and kept until `reset()`: :math:`y = x \cdot mask/(1 - p)`.

    Identity in eval mode.

    Args:
        p: probability of a unit to be dropped, in [0, 1).
        step_mode: 's', [N, *] -> [N, *]; 'm', [T, N, *] -> [T, N, *], one mask for all T.

    States: mask, already scaled by 1/(1 - p).
    Raises: ValueError where p lies outside [0, 1) or the input's shape, dtype or device differs from the mask's.
    Paper: Lee et al., "Enabling spike-based backpropagation for training deep neural network architectures", Frontiers
        in Neuroscience 2020.
    """

    def __init__(self, p: float = 0.5, step_mode: str = "s"):
        check_probability("p", p)
        super().__init__(step_mode)
        self.p = p
        self.mask: Tensor | None = None

    def draw_mask(self, x: Tensor) -> Tensor:
        """A new mask for an input x of one step."""
        return F.dropout(torch.ones_like(x), self.p)

    def single_step_forward(self, x: Tensor) -> Tensor:
        return x * self.mask_for(x) if self.training else x

    def multi_step_forward(self, x_seq: Tensor) -> Tensor:
        check_sequence(x_seq)
        return x_seq * self.mask_for(x_seq[0]) if self.training else x_seq

    def mask_for(self, x: Tensor) -> Tensor:
        """The mask of this sequence."""
        if self.mask is None:
            self.mask = self.draw_mask(x.detach())
        elif self.mask.shape != x.shape or self.mask.dtype != x.dtype or self.mask.device != x.device:
            raise ValueError(
                f"{type(self).__name__}: the mask drawn at the first step is {describe(self.mask)}, but this input is "
                f"{describe(x)}; call functional.reset_net(net) before a new sequence"
            )
        return self.mask

    def reset(self) -> None:
        self.mask = None

    def extra_repr(self) -> str:
        return f"p={self.p}, step_mode={self.step_mode!r}"


class Dropout2d(Dropout):
    """`Dropout` of whole channels, for [N, C, H, W] a step."""

    def __init__(self, p: float = 0.2, step_mode: str = "s"):
        super().__init__(p, step_mode)

    def draw_mask(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            raise ValueError(f"x must be [N, C, H, W] at each step, but is {list(x.shape)}")
        return F.dropout2d(torch.ones_like(x), self.p)


class MultiStepDropout(Dropout):
    """`Dropout` in multi-step mode."""

    def __init__(self, p: float = 0.5):
        super().__init__(p, "m")


class MultiStepDropout2d(Dropout2d):
    """`Dropout2d` in multi-step mode."""

    def __init__(self, p: float = 0.2):
        super().__init__(p, "m")


class DropConnectLinear(StatefulModule):
    r"""Linear layer whose weights are dropped, each sample of the batch its own.

    .. math::
        y &= act(x\,(M_w W)^T + M_b b) && \text{training, } M \sim Bernoulli(1 - p) \\
        y &= \frac1S \sum_{i=1}^{S} act(u_i),\quad u_i \sim \mathcal N(\mu, \sigma^2) && \text{eval, S = samples\_num}

    with :math:`\mu = (1-p)(xW^T + b)` and :math:`\sigma^2 = p(1-p)(x^2 (W^2)^T + b^2)`, the moments of the dropped sum.

    Args:
        in_features, out_features, bias: as `nn.Linear`.
        p: probability of a weight to be dropped, in [0, 1). 0 drops nothing, in training and in eval.
        samples_num: number of samples in eval.
        invariant: the masks of the first step are kept until `reset()`; otherwise each step draws its own.
        activation: applied to the sum; None is the identity. The default is a ReLU.
        step_mode: 's', [N, in_features] -> [N, out_features]; 'm', the same over [T, N, in_features].

    States: the masks of weights and bias, where invariant.
    Raises: ValueError where p lies outside [0, 1), a size is not a positive integer or x is not [N, in_features].
    Paper: Wan et al., "Regularization of neural networks using DropConnect", ICML 2013.

    Fixed against the original: with p = 0 nothing is dropped (a weight whose random number was 0 used to be), and eval
    works (the normal distribution used to refuse a variance of 0).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        p: float = 0.5,
        samples_num: int = 1024,
        invariant: bool = False,
        activation: nn.Module | None = nn.ReLU(),  # noqa: B008  (stateless)
        step_mode: str = "s",
    ):
        check_count("in_features", in_features)
        check_count("out_features", out_features)
        check_count("samples_num", samples_num)
        check_probability("p", p)
        check_bool("invariant", invariant)
        super().__init__(step_mode)
        self.in_features = in_features
        self.out_features = out_features
        self.p = p
        self.samples_num = samples_num
        self.invariant = invariant
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.reset_parameters()
        self.mask_w: Tensor | None = None
        self.mask_b: Tensor | None = None

    def reset_parameters(self) -> None:
        """Draw weight and bias as `nn.Linear` does."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features)
            nn.init.uniform_(self.bias, -bound, bound)

    def single_step_forward(self, x: Tensor) -> Tensor:
        if x.dim() != 2 or x.shape[1] != self.in_features:
            raise ValueError(f"x must be [N, in_features = {self.in_features}] at each step, but is {list(x.shape)}")
        if self.training:
            return self._activate(self.drop_connect(x))
        if self.p == 0:
            return self._activate(F.linear(x, self.weight, self.bias))
        return self.moment_matching(x)

    def multi_step_forward(self, x_seq: Tensor) -> Tensor:
        check_sequence(x_seq)
        return torch.stack([self.single_step_forward(x) for x in x_seq.unbind(0)])

    def drop_connect(self, x: Tensor) -> Tensor:
        """The linear map with weights dropped, [N, out_features]."""
        mask_w, mask_b = self.masks_for(x)
        y = torch.bmm(self.weight * mask_w, x.unsqueeze(-1)).squeeze(-1)
        return y if self.bias is None else y + self.bias * mask_b

    def masks_for(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Which weights [N, out, in] and biases [N, out] are kept."""
        if self.mask_w is not None and self.mask_b is not None:
            if self.mask_w.shape[0] != x.shape[0]:
                raise ValueError(
                    f"DropConnectLinear: the masks are for a batch of {self.mask_w.shape[0]}, but x is "
                    f"{list(x.shape)}; call functional.reset_net(net) before a new sequence"
                )
            return self.mask_w, self.mask_b
        mask_w = torch.rand(x.shape[0], *self.weight.shape, device=x.device) >= self.p
        mask_b = torch.rand(x.shape[0], self.out_features, device=x.device) >= self.p
        if self.invariant:
            self.mask_w, self.mask_b = mask_w, mask_b
        return mask_w, mask_b

    def moment_matching(self, x: Tensor) -> Tensor:
        """The mean activation of `samples_num` draws from the normal with the moments of the dropped sum."""
        mean = (1 - self.p) * F.linear(x, self.weight, self.bias)
        bias2 = None if self.bias is None else self.bias.square()
        variance = self.p * (1 - self.p) * F.linear(x.square(), self.weight.square(), bias2)
        deviation = variance.clamp_min(torch.finfo(x.dtype).tiny).sqrt()  # a square root has no gradient at 0
        noise = torch.randn(self.samples_num, *mean.shape, dtype=mean.dtype, device=mean.device)
        return self._activate(mean + deviation * noise).mean(0)

    def _activate(self, y: Tensor) -> Tensor:
        return y if self.activation is None else self.activation(y)

    def reset(self) -> None:
        self.mask_w = self.mask_b = None

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"p={self.p}, invariant={self.invariant}"
        )

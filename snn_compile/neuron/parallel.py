"""Parallel spiking neurons (PSN): no reset, so that all steps of a sequence are one matrix product over time.

    s = H(W x + b)          x [T, *], W [T, T], b [T, 1]

There is no recurrence here, and no loop: a compiler leaves these to matmul.
Paper: Fang et al., "Parallel spiking neurons with high efficiency and ability to learn long-term dependencies", NeurIPS
2023 (arXiv 2304.12760).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from snn_compile.neuron.checks import check_count, check_sequence
from snn_compile.neuron.multi_step import MultiStepModule
from snn_compile.neuron.stateful import StatefulModule
from snn_compile.surrogate import ATan


def _check_steps(x_seq: Tensor, T: int) -> None:
    check_sequence(x_seq)
    if x_seq.shape[0] != T:
        raise ValueError(f"x_seq must have T = {T} steps in its first dimension, but is {list(x_seq.shape)}")


class PSN(MultiStepModule):
    r"""Parallel spiking neuron: :math:`s = H(W x + b)` over T steps, W and b learnable, every step seeing every other.

    Args:
        T: number of steps.
        surrogate_function: None is `ATan()`.

    Shapes: x_seq [T, N, *] -> the same.
    Raises: ValueError where x_seq has another number of steps.
    """

    def __init__(self, T: int, surrogate_function: nn.Module | None = None):
        check_count("T", T)
        super().__init__()
        self.T = T
        self.surrogate_function = ATan() if surrogate_function is None else surrogate_function
        self.weight = nn.Parameter(torch.empty(T, T))
        self.bias = nn.Parameter(torch.full((T, 1), -1.0))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x_seq: Tensor) -> Tensor:
        _check_steps(x_seq, self.T)
        h_seq = torch.addmm(self.bias, self.weight, x_seq.flatten(1))
        return self.surrogate_function(h_seq).view(x_seq.shape)

    def extra_repr(self) -> str:
        return f"T={self.T}"


class MaskedPSN(StatefulModule):
    r"""PSN whose step sees only the last k inputs.

    .. math:: s = H\left((\lambda M + 1 - \lambda) \odot W\,x + b\right),\quad M_{ij} = 1\text{ for }0 \le i - j < k

    Raise `lambda_` from 0 to 1 during training: at 1 the neuron is causal, of order k, and can run step by step.

    Args:
        k: order, the number of inputs that a step sees.
        T: number of steps.
        lambda_init: lambda at the start.
        surrogate_function: None is `ATan()`.
        step_mode: 's', one step, lambda must be 1; 'm', T steps.

    States: in single-step mode, the last k inputs and the number of steps done.
    Shapes: x_seq [T, N, *] or x [N, *] -> the same.
    Raises: ValueError where x_seq has another number of steps, or in single-step mode lambda is below 1;
        OverflowError where more than T single steps are run without `reset()`.
    """

    _lambda_: Tensor
    mask0: Tensor

    def __init__(
        self,
        k: int,
        T: int,
        lambda_init: float = 0.0,
        surrogate_function: nn.Module | None = None,
        step_mode: str = "s",
    ):
        check_count("k", k)
        check_count("T", T)
        super().__init__(step_mode)
        self.k = k
        self.T = T
        self.surrogate_function = ATan() if surrogate_function is None else surrogate_function
        self.weight = nn.Parameter(torch.empty(T, T))
        self.bias = nn.Parameter(torch.full((T, 1), -1.0))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        self.register_buffer("_lambda_", torch.tensor(float(lambda_init)))
        self.register_buffer("mask0", torch.ones(T, T).tril().triu(1 - k))
        self.queue: Tensor | None = None
        self.time_step = 0

    @property
    def lambda_(self) -> Tensor:
        return self._lambda_

    @lambda_.setter
    def lambda_(self, value: float) -> None:
        self._lambda_.fill_(value)

    def masked_weight(self) -> Tensor:
        """W times the mask, [T, T]."""
        return self.weight * (self._lambda_ * self.mask0 + (1 - self._lambda_))

    def single_step_forward(self, x: Tensor) -> Tensor:
        if self._lambda_ < 1:
            raise ValueError(f"lambda_ must be 1 in single-step mode, but is {self._lambda_.item()}")
        if self.time_step >= self.T:
            raise OverflowError(f"MaskedPSN has run its T = {self.T} steps; call functional.reset_net(net)")
        self.queue = _push(self.queue, x, self.k)
        t = self.time_step
        weight = torch.nn.functional.pad(self.masked_weight()[t, : t + 1], (self.k, 0))[-self.k :]
        self.time_step = t + 1
        return self.surrogate_function(torch.tensordot(weight, self.queue, 1) + self.bias[t])

    def multi_step_forward(self, x_seq: Tensor) -> Tensor:
        _check_steps(x_seq, self.T)
        h_seq = torch.addmm(self.bias, self.masked_weight(), x_seq.flatten(1))
        return self.surrogate_function(h_seq).view(x_seq.shape)

    def reset(self) -> None:
        self.queue = None
        self.time_step = 0

    def extra_repr(self) -> str:
        return f"k={self.k}, T={self.T}, lambda_={self._lambda_.item()}, step_mode={self.step_mode!r}"


class SlidingPSN(StatefulModule):
    r"""PSN with one window of k weights for all steps: :math:`s_t = H(\sum_{i=0}^{k-1} w_i\,x_{t-k+1+i} + b)`.

    Args:
        k: order, the number of inputs that a step sees.
        exp_init: the weights start as ..., 1/4, 1/2, 1; otherwise kaiming-uniform.
        surrogate_function: None is `ATan()`.
        step_mode: 's', one step; 'm', all steps at once.

    States: in single-step mode, the last k inputs.
    Shapes: x_seq [T, N, *] or x [N, *] -> the same.
    """

    def __init__(self, k: int, exp_init: bool = True, surrogate_function: nn.Module | None = None, step_mode: str = "s"):
        check_count("k", k)
        super().__init__(step_mode)
        self.k = k
        self.surrogate_function = ATan() if surrogate_function is None else surrogate_function
        weight = torch.empty(1, k)
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        if exp_init:
            weight[0] = 2.0 ** torch.arange(1 - k, 1)
        self.weight = nn.Parameter(weight[0])
        self.bias = nn.Parameter(torch.tensor(-1.0))
        self.queue: Tensor | None = None

    def gemm_weight(self, T: int) -> Tensor:
        """The window as a banded matrix [T, T]: row t holds the weights of step t."""
        lag = torch.arange(T, device=self.weight.device)
        lag = lag[:, None] - lag[None, :]  # how many steps ago the column's input was
        inside = (lag >= 0) & (lag < self.k)
        return torch.where(inside, self.weight[(self.k - 1 - lag).clamp(0, self.k - 1)], 0)

    def single_step_forward(self, x: Tensor) -> Tensor:
        self.queue = _push(self.queue, x, self.k)
        return self.surrogate_function(torch.tensordot(self.weight, self.queue, 1) + self.bias)

    def multi_step_forward(self, x_seq: Tensor) -> Tensor:
        check_sequence(x_seq)
        h_seq = torch.addmm(self.bias, self.gemm_weight(x_seq.shape[0]), x_seq.flatten(1))
        return self.surrogate_function(h_seq).view(x_seq.shape)

    def reset(self) -> None:
        self.queue = None

    def extra_repr(self) -> str:
        return f"k={self.k}, step_mode={self.step_mode!r}"


def _push(queue: Tensor | None, x: Tensor, k: int) -> Tensor:
    """The last k inputs, [k, N, *], oldest first; before the first input they are 0."""
    if queue is None:
        queue = x.new_zeros(k, *x.shape)
    if queue.shape[1:] != x.shape:
        raise ValueError(
            f"x must be {list(queue.shape[1:])} as in the step before, but is {list(x.shape)}; "
            "call functional.reset_net(net) before a new sequence"
        )
    return torch.cat((queue[1:], x.unsqueeze(0)))

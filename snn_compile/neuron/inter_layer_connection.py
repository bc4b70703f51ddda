"""Neurons with an inter-layer connection (ILC): a step's spikes, through a grouped convolution, feed the next step.

    x[t+1] <- x[t+1] + conn(s[t])

The population that decodes one action is one group, so that its neurons excite and inhibit one another.
Paper: Chen et al., "Fully spiking actor network with intra-layer connections for reinforcement learning", arXiv
2401.05444.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from snn_compile.neuron.checks import check_count, check_float, check_floating, check_sequence
from snn_compile.neuron.multi_step import MultiStepModule
from snn_compile.surrogate import Rect


class ILCBaseNode(MultiStepModule):
    r"""A layer of `act_dim` populations of `dec_pop_dim` spiking neurons each; multi-step only.

    Each step charges the states (`neuronal_charge`), fires and resets as `BaseNode` does, and adds `conn(s)` to the
    input of the step that follows. Every call starts fresh: v from v_reset (None: from 0), currents from 0.
    The caller's x_seq is never written to, and v_reset None starts from 0: in SpikingJelly 2.0.0 the first is
    overwritten and the second fails.

    Args:
        act_dim: number of populations (actions).
        dec_pop_dim: neurons a population.
        v_threshold, v_reset, surrogate_function: see `BaseNode`; the surrogate's default is `Rect()`.

    Shapes: x_seq [T, N, act_dim*dec_pop_dim] -> the same.
    Raises: ValueError where a dimension is not a positive integer or x_seq has another shape; TypeError where
        v_threshold or v_reset is not a float.
    """

    #: states beside the membrane potential; they start from 0
    currents = 0

    #: neuronal_charge(x, v, *currents) -> (h, *currents): the states after charging; each subclass gives its own
    neuronal_charge: Callable[..., tuple[Tensor, ...]]

    def __init__(
        self,
        act_dim: int,
        dec_pop_dim: int,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: nn.Module | None = None,
    ):
        check_count("act_dim", act_dim)
        check_count("dec_pop_dim", dec_pop_dim)
        check_float("v_threshold", v_threshold)
        check_float("v_reset", v_reset, or_none=True)
        super().__init__()
        self.act_dim = act_dim
        self.dec_pop_dim = dec_pop_dim
        self.out_pop_dim = act_dim * dec_pop_dim
        self.v_threshold = v_threshold
        self.v_reset = v_reset
        self.surrogate_function = Rect() if surrogate_function is None else surrogate_function
        self.conn = nn.Conv1d(act_dim, self.out_pop_dim, dec_pop_dim, groups=act_dim)

    def neuronal_reset(self, h: Tensor, s: Tensor) -> Tensor:
        """The membrane potential v after the spikes s."""
        if self.v_reset is None:
            return h - s * self.v_threshold
        return s * self.v_reset + (1 - s) * h

    def fresh_states(self, x: Tensor) -> list[Tensor]:
        """The states before the first step, for an input x [N, act_dim*dec_pop_dim]."""
        v = torch.full_like(x, 0.0 if self.v_reset is None else self.v_reset)
        return [v, *(torch.zeros_like(x) for _ in range(self.currents))]

    def forward(self, x_seq: Tensor) -> Tensor:
        self._check(x_seq)
        states = self.fresh_states(x_seq[0])
        feedback = torch.zeros_like(x_seq[0])
        s_seq = []
        for x in x_seq.unbind(0):
            h, *rest = self.neuronal_charge(x + feedback, *states)
            s = self.surrogate_function(h - self.v_threshold)
            states = [self.neuronal_reset(h, s), *rest]
            feedback = self.conn(s.view(-1, self.act_dim, self.dec_pop_dim)).view(-1, self.out_pop_dim)
            s_seq.append(s)
        return torch.stack(s_seq)

    def _check(self, x_seq: Tensor) -> None:
        check_sequence(x_seq)
        check_floating(x_seq)
        if x_seq.dim() != 3 or x_seq.shape[2] != self.out_pop_dim:
            raise ValueError(
                f"x_seq must be [T, N, act_dim*dec_pop_dim] = [T, N, {self.out_pop_dim}], but is {list(x_seq.shape)}"
            )

    def extra_repr(self) -> str:
        return f"act_dim={self.act_dim}, dec_pop_dim={self.dec_pop_dim}, v_threshold={self.v_threshold}, v_reset={self.v_reset}"


class ILCIFNode(ILCBaseNode):
    r"""ILC neuron that integrates: :math:`h = v + x`. See `ILCBaseNode`."""

    def neuronal_charge(self, x: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return (v + x,)


class ILCLIFNode(ILCBaseNode):
    r"""ILC neuron with a decaying potential: :math:`h = v\,v_{decay} + x`. See `ILCBaseNode`."""

    def __init__(
        self,
        act_dim: int,
        dec_pop_dim: int,
        v_decay: float = 0.75,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: nn.Module | None = None,
    ):
        check_float("v_decay", v_decay)
        super().__init__(act_dim, dec_pop_dim, v_threshold, v_reset, surrogate_function)
        self.v_decay = v_decay

    def neuronal_charge(self, x: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return (v * self.v_decay + x,)


class ILCCUBALIFNode(ILCBaseNode):
    r"""ILC neuron with a synaptic current: :math:`c = c\,c_{decay} + x;\ h = v\,v_{decay} + c`. See `ILCBaseNode`."""

    currents = 1

    def __init__(
        self,
        act_dim: int,
        dec_pop_dim: int,
        c_decay: float = 0.5,
        v_decay: float = 0.75,
        v_threshold: float = 0.5,
        v_reset: float | None = 0.0,
        surrogate_function: nn.Module | None = None,
    ):
        check_float("c_decay", c_decay)
        check_float("v_decay", v_decay)
        super().__init__(act_dim, dec_pop_dim, v_threshold, v_reset, surrogate_function)
        self.c_decay = c_decay
        self.v_decay = v_decay

    def neuronal_charge(self, x: Tensor, v: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        c = c * self.c_decay + x
        return v * self.v_decay + c, c

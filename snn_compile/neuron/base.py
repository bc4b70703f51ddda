"""What all spiking neurons share: charge, fire, reset.

    charge   h = f(x, v)                       the neuron's own equation
    fire     s = H(h - v_threshold)            H is 1 for arguments >= 0; its gradient is the surrogate's
    reset    v = s*v_reset + (1 - s)*h         hard
             v = h - s*v_threshold             soft: v_reset is None

x is the input current, v the membrane potential carried between steps, h the membrane potential after charging, s the
spike. Voltages are in the unit of v_threshold, time constants in steps.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from snn_compile.neuron.checks import check_bool, check_float, check_sequence
from snn_compile.neuron.stateful import StatefulModule
from snn_compile.surrogate import Sigmoid


class BaseNode(StatefulModule):
    """A spiking neuron with the membrane potential `v`.

    A subclass gives `neuronal_charge(x, v) -> h`; a neuron with further states overrides `step` as well.

    Args:
        v_threshold: the neuron fires where h >= v_threshold.
        v_reset: the potential after a spike; None subtracts v_threshold instead. v starts from it (None: from 0).
        surrogate_function: the step function with its surrogate gradient; None is `Sigmoid()`.
        detach_reset: no gradient flows through the spike in the reset.
        step_mode: 's', forward is one step, [N, *] -> [N, *]; 'm', forward is T steps, [T, N, *] -> [T, N, *].
        store_v_seq: a multi-step call leaves `v_seq` [T, N, *], the potential after the reset of each step.

    Raises:
        TypeError: v_threshold or v_reset is not a float, detach_reset or store_v_seq not a bool.
        ValueError: step_mode is unknown; see `StatefulModule` for the errors of a call.
    """

    def __init__(
        self,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: nn.Module | None = None,
        detach_reset: bool = False,
        step_mode: str = "s",
        store_v_seq: bool = False,
    ):
        check_float("v_threshold", v_threshold)
        check_float("v_reset", v_reset, or_none=True)
        check_bool("detach_reset", detach_reset)
        check_bool("store_v_seq", store_v_seq)
        super().__init__(step_mode)
        self.v_threshold = v_threshold
        self.v_reset = v_reset
        self.surrogate_function = Sigmoid() if surrogate_function is None else surrogate_function
        self.detach_reset = detach_reset
        self.store_v_seq = store_v_seq
        self.v_seq: Tensor | None = None
        self.register_state("v", 0.0 if v_reset is None else v_reset)

    def step(self, x: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        h = self.neuronal_charge(x, v)
        s = self.neuronal_fire(h)
        v = self.neuronal_reset(h, s)
        return s, v

    def neuronal_charge(self, x: Tensor, v: Tensor) -> Tensor:
        """The membrane potential h after charging with the input current x."""
        raise NotImplementedError(f"{type(self).__name__} must give its charge in neuronal_charge(x, v)")

    def neuronal_fire(self, h: Tensor) -> Tensor:
        """The spikes: 1 where h reaches the threshold, else 0."""
        return self.surrogate_function(h - self.v_threshold)

    def neuronal_reset(self, h: Tensor, s: Tensor) -> Tensor:
        """The membrane potential v after the spikes s."""
        if self.detach_reset:
            s = s.detach()
        if self.v_reset is None:
            return h - s * self.v_threshold
        return s * self.v_reset + (1 - s) * h

    def multi_step_forward(self, x_seq: Tensor) -> Tensor:
        if not self.store_v_seq:
            return super().multi_step_forward(x_seq)
        check_sequence(x_seq)
        states = self.states_for(x_seq[0])
        s_seq, v_seq = [], []
        for x in x_seq.unbind(0):
            s, *states = self.step(x, *states)
            s_seq.append(s)
            v_seq.append(states[0])
        self.keep(states)
        self.v_seq = torch.stack(v_seq)
        return torch.stack(s_seq)

    def reset(self) -> None:
        super().reset()
        self.v_seq = None

    def extra_repr(self) -> str:
        return (
            f"v_threshold={self.v_threshold}, v_reset={self.v_reset}, detach_reset={self.detach_reset}, "
            f"step_mode={self.step_mode!r}"
        )

"""Modules that carry states from one time step to the next, and from one call to the next.

    module(x); module(x)      continues where the first call stopped
    module.reset()            the next call starts fresh

A state is a plain attribute, neither parameter nor buffer: it is not in `state_dict()`, and DDP does not broadcast it.
Before the first call it is the number it starts from; from then on it is a tensor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from snn_compile.neuron.checks import check_choice, check_floating, check_sequence


class StatefulModule(nn.Module):
    """A module with states, stepped over time.

    A subclass registers its states in `__init__` and says what one step does in `step(x, *states) -> (y, *states)`.

    Args:
        step_mode: 's', forward is one step, [N, *] -> [N, *]; 'm', forward is T steps, [T, N, *] -> [T, N, *].

    Raises:
        ValueError: `step_mode` is unknown; the input of a multi-step call is not [T, N, *]; or the input's shape, dtype
            or device differs from those of the states carried from the call before.
        TypeError: the input is not of floating point.
    """

    step_modes: tuple[str, ...] = ("s", "m")
    #: how a multi-step call runs over time: "python", a plain loop, or "scan" (`functional.set_time_loop`)
    time_loop: str = "python"

    #: step(x, *states) -> (y, *states): one time step; each subclass gives it its own arguments
    step: Callable[..., tuple[Tensor, ...]]

    def __init__(self, step_mode: str = "s"):
        super().__init__()
        self.step_mode = step_mode
        self._initial: dict[str, float] = {}

    @property
    def step_mode(self) -> str:
        return self._step_mode

    @step_mode.setter
    def step_mode(self, mode: str) -> None:
        check_choice("step_mode", mode, self.step_modes)
        self._step_mode = mode

    @property
    def is_functional(self) -> bool:
        """Whether `step` changes nothing but the states that it is handed: then a scan can run it."""
        return hasattr(self, "step")

    # ------------------------------------------------------------------------------------------------- one call

    def forward(self, x: Tensor) -> Tensor:
        if self._step_mode == "s":
            return self.single_step_forward(x)
        return self.multi_step_forward(x)

    def single_step_forward(self, x: Tensor) -> Tensor:
        y, *states = self.step(x, *self.states_for(x))
        self.keep(states)
        return y

    def multi_step_forward(self, x_seq: Tensor) -> Tensor:
        check_sequence(x_seq)
        states = self.states_for(x_seq[0])
        if self.time_loop == "scan" and self.is_functional:
            states, y_seq = scan_over_time(self.step, states, x_seq)
            self.keep(states)
            return y_seq
        ys = []
        for x in x_seq.unbind(0):
            y, *states = self.step(x, *states)
            ys.append(y)
        self.keep(states)
        return torch.stack(ys)

    # ------------------------------------------------------------------------------------------------- the states

    def register_state(self, name: str, initial: float) -> None:
        """Add the state `name`; `initial` fills it at the first step. States are handed to `step` in this order."""
        self._initial[name] = initial
        setattr(self, name, initial)

    @property
    def number_of_states(self) -> int:
        return len(self._initial)

    def state_like(self, x: Tensor) -> Tensor:
        """A tensor with the shape, dtype and device that the states have for an input `x` of one step."""
        return x

    def states_for(self, x: Tensor) -> list[Tensor]:
        """The states to step from: those carried from the call before, or fresh ones."""
        like = self.state_like(x)
        states = []
        for name, initial in self._initial.items():
            state = getattr(self, name)
            if not isinstance(state, Tensor):
                check_floating(x)
                state = torch.full_like(like, initial, requires_grad=False)
            elif state.shape != like.shape or state.dtype != like.dtype or state.device != like.device:
                raise ValueError(
                    f"{type(self).__name__}: the state {name!r} carried from the call before is {describe(state)}, but "
                    f"this input needs {describe(like)}; call functional.reset_net(net) before a new sequence"
                )
            states.append(state)
        return states

    def keep(self, states: list[Tensor]) -> None:
        """Carry `states` to the next call."""
        for name, state in zip(self._initial, states, strict=True):
            setattr(self, name, state)

    def reset(self) -> None:
        """Forget the states: the next call starts fresh."""
        for name, initial in self._initial.items():
            setattr(self, name, initial)

    def detach(self) -> None:
        """Cut the states off the autograd graph and keep their values (truncated backpropagation through time)."""
        for name, value in self._carried():
            self.__dict__[name] = value.detach()

    def _carried(self) -> list[tuple[str, Tensor]]:
        """Every tensor that is a plain attribute: the states, and sequences kept for the user."""
        return [(name, value) for name, value in self.__dict__.items() if isinstance(value, Tensor)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StatefulModule:
        for name, value in self._carried():
            self.__dict__[name] = fn(value)
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict:
        """For copy.deepcopy and pickle: the states go along as values, without their autograd graph."""
        return self.__dict__ | {name: value.detach() for name, value in self._carried()}


def scan_over_time(step: Callable[..., tuple[Tensor, ...]], states: list[Tensor], x_seq: Tensor) -> tuple[list[Tensor], Tensor]:
    """The same loop as a `torch` scan: a compiler traces one step of it, however many there are.

    (Private in torch 2.11 to 2.13, hence imported where it is asked for; results of a step may not be one tensor: clones.)
    """
    from torch._higher_order_ops.scan import scan

    def body(carried: list[Tensor], x: Tensor) -> tuple[list[Tensor], Tensor]:
        y, *following = step(x, *carried)
        return [state.clone() for state in following], y.clone()

    return scan(body, states, x_seq, dim=0)  # type: ignore[no-any-return]


def describe(x: Tensor) -> str:
    """`float32 [4, 8] on cpu`, for messages."""
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)} on {x.device}"

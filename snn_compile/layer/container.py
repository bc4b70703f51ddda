"""Containers that run modules over time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from snn_compile.neuron import chain
from snn_compile.neuron.checks import check_count, check_sequence
from snn_compile.neuron.stateful import StatefulModule, scan_over_time


def _check_single_step(*modules: nn.Module) -> None:
    for module in modules:
        if getattr(module, "step_mode", "s") != "s":
            raise ValueError(
                f"step_mode must be 's' for a {type(module).__name__} inside this container, but is {module.step_mode!r}"
            )


class MultiStepContainer(nn.Sequential):
    """Runs single-step modules, in sequence, at each of T steps.

    Under `functional.set_time_loop(net, "scan")` one scan runs all of them.

    Shapes: x_seq [T, N, *] -> [T, ...], whatever the modules make of [N, *].
    Raises: ValueError where a module is in multi-step mode or x_seq is not [T, N, *].
    """

    steps_its_children = True
    time_loop: str = "python"

    def __init__(self, *modules: nn.Module):
        super().__init__(*modules)
        _check_single_step(*self)

    def forward(self, x_seq: Tensor) -> Tensor:
        check_sequence(x_seq)
        modules = [inner for module in self for inner in chain.flattened(module)]
        if self.time_loop == "scan" and chain.is_functional(modules) and (states := chain.states_for(modules, x_seq[0])):
            following, scanned = scan_over_time(partial(chain.step, modules), states, x_seq)
            chain.keep(modules, following)
            return scanned
        y_seq = []
        for x in x_seq.unbind(0):
            for module in self:
                x = module(x)
            y_seq.append(x)
        return torch.stack(y_seq)


class SeqToANNContainer(nn.Sequential):
    """Runs stateless modules on all steps at once: [T, N, *] is seen as [T*N, *].

    Shapes: x_seq [T, N, *] -> [T, N, ...].
    Raises: ValueError where a module carries states or x_seq is not [T, N, *].
    """

    steps_its_children = True

    def __init__(self, *modules: nn.Module):
        super().__init__(*modules)
        for module in self.modules():
            if isinstance(module, StatefulModule):
                raise ValueError(
                    f"modules must be stateless in a SeqToANNContainer, but {type(module).__name__} carries states "
                    "over time; put it into a MultiStepContainer or beside this one"
                )

    def forward(self, x_seq: Tensor) -> Tensor:
        check_sequence(x_seq)
        y = super().forward(x_seq.flatten(0, 1))
        return y.view(x_seq.shape[0], x_seq.shape[1], *y.shape[1:])


class _RecurrentContainer(StatefulModule):
    """y_t = sub(feed(x_t, y_{t-1})): what the containers have in common that feed a module's output back."""

    steps_its_children = True

    def __init__(self, sub_module: nn.Module, step_mode: str):
        _check_single_step(sub_module)
        super().__init__(step_mode)
        self.sub_module = sub_module
        self.register_state("y", 0.0)

    def feed(self, x: Tensor, y: Tensor) -> Tensor:
        """What the sub-module gets."""
        raise NotImplementedError(f"{type(self).__name__} must give what its module gets in feed(x, y)")

    def check(self, x: Tensor, y: Tensor) -> None:
        """Raises ValueError where the sub-module gives what cannot be fed back."""

    def step(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        y = self.sub_module(self.feed(x, y))
        self.check(x, y)
        return y, y

    @property
    def is_functional(self) -> bool:
        """Not by itself: the sub-module may keep states."""
        return False

    def multi_step_forward(self, x_seq: Tensor) -> Tensor:
        modules = chain.flattened(self.sub_module)
        if self.time_loop != "scan" or not chain.is_functional(modules):
            return super().multi_step_forward(x_seq)
        check_sequence(x_seq)
        (y,) = self.states_for(x_seq[0])
        states = chain.states_for(modules, self.feed(x_seq[0], y))
        (y, *states), y_seq = scan_over_time(self._step_of_all, [y, *states], x_seq)
        self.keep([y])
        chain.keep(modules, states)
        return y_seq

    def _step_of_all(self, x: Tensor, y: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        """`step`, where the sub-module's states are handed on, too."""
        y, *following = chain.step(chain.flattened(self.sub_module), self.feed(x, y), *states)
        self.check(x, y)
        return (y, y, *following)


class ElementWiseRecurrentContainer(_RecurrentContainer):
    r"""Feeds a module's output back into its input: :math:`y_t = sub(f(x_t, y_{t-1}))`, :math:`y_{-1} = 0`.

    Args:
        sub_module: a single-step module that keeps the shape.
        element_wise_function: f(x, y), for instance `torch.add`.
        step_mode: 's', [N, *] -> [N, *]; 'm', [T, N, *] -> [T, N, *].

    States: y; those of the sub-module are its own (`functional.reset_net` resets both).
    Raises: ValueError where sub_module is in multi-step mode or changes the shape.
    """

    def __init__(self, sub_module: nn.Module, element_wise_function: Callable[[Tensor, Tensor], Tensor], step_mode: str = "s"):
        super().__init__(sub_module, step_mode)
        self.element_wise_function = element_wise_function

    def feed(self, x: Tensor, y: Tensor) -> Tensor:
        return self.element_wise_function(x, y)

    def check(self, x: Tensor, y: Tensor) -> None:
        if y.shape != x.shape:
            raise ValueError(f"sub_module must keep the shape {list(x.shape)} of x, but gives {list(y.shape)}")

    def extra_repr(self) -> str:
        return f"element_wise_function={self.element_wise_function}, step_mode={self.step_mode!r}"


class LinearRecurrentContainer(_RecurrentContainer):
    r"""Feeds a module's output back through a linear layer: :math:`y_t = sub(W [x_t, y_{t-1}] + b)`, y before the
    first step being 0.

    Args:
        sub_module: a single-step module, [N, in_features] -> [N, out_features].
        in_features: size of x.
        out_features: size of y.
        bias: whether the linear layer has one.
        step_mode: 's', [N, in_features] -> [N, out_features]; 'm', the same over [T, N, in_features].

    States: y; those of the sub-module are its own (`functional.reset_net` resets both).
    Raises: ValueError where sub_module is in multi-step mode or a size is not a positive integer.
    """

    def __init__(self, sub_module: nn.Module, in_features: int, out_features: int, bias: bool = True, step_mode: str = "s"):
        check_count("in_features", in_features)
        check_count("out_features", out_features)
        super().__init__(sub_module, step_mode)
        self.rc = nn.Linear(in_features + out_features, in_features, bias)
        self.sub_module_out_features = out_features

    def state_like(self, x: Tensor) -> Tensor:
        return x.new_empty(*x.shape[:-1], self.sub_module_out_features)

    def feed(self, x: Tensor, y: Tensor) -> Tensor:
        return self.rc(torch.cat((x, y), dim=-1))  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"step_mode={self.step_mode!r}"

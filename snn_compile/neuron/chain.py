"""Modules in sequence as one function: step(x, *states) -> (y, *states), with the states of all of them.

    for module in modules: x = module(x)      changes the states that the modules keep: no scan can run that
    y, *states = step(modules, x, *states)    changes nothing

So containers that step their modules over time can hand the states from step to step themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from snn_compile.neuron.stateful import StatefulModule


def flattened(module: nn.Module) -> list[nn.Module]:
    """The modules of an `nn.Sequential`, in the order in which they run; any other module is alone."""
    if type(module) is not nn.Sequential:
        return [module]
    return [inner for child in module for inner in flattened(child)]


def is_functional(modules: Sequence[nn.Module]) -> bool:
    """Whether `step` is what calling the modules does."""
    return all(m.is_functional and not _has_hooks(m) if isinstance(m, StatefulModule) else _keeps_nothing(m) for m in modules)


def states_for(modules: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """The states that all modules step from, for an input `x` of one step."""
    states: list[Tensor] = []
    for module in modules:
        own = module.states_for(x) if isinstance(module, StatefulModule) else []
        x, *_ = step([module], x, *own)  # (the next module's states have the size of what it gets)
        states += own
    return states


def step(modules: Sequence[nn.Module], x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
    """One step of all modules, on `states` in place of those that they keep."""
    following: list[Tensor] = []
    for module in modules:
        if isinstance(module, StatefulModule):
            n = len(following)
            x, *own = module.step(x, *states[n : n + module.number_of_states])
            following += own
        else:
            x = module(x)
    return (x, *following)


def keep(modules: Sequence[nn.Module], states: Sequence[Tensor]) -> None:
    """The modules carry `states` to the next call."""
    done = 0
    for module in modules:
        if isinstance(module, StatefulModule):
            n = module.number_of_states
            module.keep(list(states[done : done + n]))
            done += n


def _keeps_nothing(module: nn.Module) -> bool:
    """No states and no statistics inside; and it draws no numbers, of which `states_for` would take some."""
    return not any(
        isinstance(m, (StatefulModule, nn.RNNBase)) or (m.training and _changes_in_training(m)) for m in module.modules()
    )


def _changes_in_training(module: nn.Module) -> bool:
    return isinstance(module, (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd))


def _has_hooks(module: nn.Module) -> bool:
    """Which are for calls of the module, and its step is none."""
    return bool(module._forward_hooks or module._forward_pre_hooks)

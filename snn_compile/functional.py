"""Functions over a whole network of stateful modules."""

from __future__ import annotations

from torch import nn

__all__ = ["detach_net", "reset_net", "set_step_mode", "set_time_loop"]


def reset_net(net: nn.Module) -> None:
    """Reset every module of `net` that has a `reset()`: the next call starts a new sequence."""
    for module in net.modules():
        reset = getattr(module, "reset", None)
        if callable(reset):
            reset()


def detach_net(net: nn.Module) -> None:
    """Cut the states of every module of `net` off the autograd graph and keep their values."""
    for module in net.modules():
        detach = getattr(module, "detach", None)
        if callable(detach):
            detach()


def set_step_mode(net: nn.Module, step_mode: str) -> None:
    """Set the step mode of every module of `net` that has one.

    Modules inside a container that steps them itself (`MultiStepContainer`, `LinearRecurrentContainer`, ...) stay in
    single-step mode.

    Raises: ValueError where `step_mode` is neither 's' nor 'm', or where a module does not know it, which it names.
    """
    if step_mode not in ("s", "m"):
        raise ValueError(f"step_mode must be one of 's', 'm', but is {step_mode!r}")
    if hasattr(net, "step_mode"):
        try:
            setattr(net, "step_mode", step_mode)  # noqa: B010  (nn.Module types its attributes)
        except ValueError as error:
            raise ValueError(f"{type(net).__name__}: {error}") from None
    if not getattr(net, "steps_its_children", False):
        for child in net.children():
            set_step_mode(child, step_mode)


def set_time_loop(net: nn.Module, time_loop: str) -> None:
    """Set how every stateful module of `net` runs over time in multi-step mode.

    "python": the plain loop, which `torch.compile` traces step by step, in time proportional to T. "scan":
    `torch._higher_order_ops.scan`, of which it traces one step; for long sequences, T = 1000 and more, and for sequences of many
    lengths. Both give the same values; without `torch.compile`, "scan" is the slower one.

    A module whose step changes more than states keeps the plain loop: statistics or dropout in training, containers within
    containers, neurons with hooks within containers. So does one that stores the potentials of all steps (`store_v_seq`).

    Raises: ValueError where `time_loop` is neither.
    """
    if time_loop not in ("python", "scan"):
        raise ValueError(f"time_loop must be one of 'python', 'scan', but is {time_loop!r}")
    for module in net.modules():
        if hasattr(module, "time_loop"):
            setattr(module, "time_loop", time_loop)  # noqa: B010  (nn.Module types its attributes)

"""Checks of constructor arguments and inputs: each error names the argument, its value, and what is allowed."""

from __future__ import annotations

from torch import Tensor


def check_float(name: str, value: object, *, or_none: bool = False) -> None:
    """TypeError unless `value` is a float (or None, where that is allowed)."""
    if isinstance(value, float) or (or_none and value is None):
        return
    raise TypeError(f"{name} must be a float{' or None' if or_none else ''}, but is {value!r}")


def check_bool(name: str, value: object) -> None:
    """TypeError unless `value` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, but is {value!r}")


def check_tau(name: str, value: object) -> None:
    """A time constant, in steps: a float greater than 1."""
    if not isinstance(value, float) or not value > 1:
        raise ValueError(f"{name} must be a float greater than 1, but is {value!r}")


def check_above(name: str, value: float, bound: float) -> None:
    """ValueError unless `value` > `bound`."""
    if not value > bound:
        raise ValueError(f"{name} must be greater than {bound}, but is {value!r}")


def check_probability(name: str, value: float) -> None:
    """ValueError unless 0 <= `value` < 1."""
    if not 0 <= value < 1:
        raise ValueError(f"{name} must lie in [0, 1), but is {value!r}")


def check_count(name: str, value: object) -> None:
    """ValueError unless `value` is an integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, but is {value!r}")


def check_choice(name: str, value: object, allowed: tuple) -> None:
    """ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, but is {value!r}")


def check_sequence(x_seq: Tensor) -> None:
    """ValueError unless `x_seq` is [T, N, *] with at least one step."""
    if x_seq.dim() < 2 or x_seq.shape[0] == 0:
        raise ValueError(f"x_seq must be [T, N, *] with T of at least 1 in multi-step mode, but is {list(x_seq.shape)}")


def check_floating(x: Tensor) -> None:
    """TypeError unless `x` is a tensor of floating point."""
    if not x.is_floating_point():
        raise TypeError(f"x must be a tensor of floating point, but its dtype is {x.dtype}")

"""Norse: initial states without a write of `requires_grad`. Tested with 1.1.0; https://github.com/norse/norse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

FALLBACK = "state_fallback"


def prepare(module: nn.Module) -> str:
    """``state.v.requires_grad = True`` (a graph break) -> the same state without it.

    The leaf that Norse marks is made inside of the call and given to nobody, so its gradient cannot be read.
    """
    fallback = getattr(module, FALLBACK, None)
    if not callable(fallback) or isinstance(fallback, InitialState):
        return ""
    found = observe(fallback)
    if found is None:
        return ""
    setattr(module, FALLBACK, found)
    return "its initial state is made without a write of `requires_grad`"


@dataclass(frozen=True)
class _Constant:
    """A tensor full of `value`: of no dims, of the input's shape, or of that with `features` as its last dim."""

    value: float
    dtype: torch.dtype
    has_dims: bool
    features: int | None

    def __call__(self, x: Tensor) -> Tensor:
        shape = () if not self.has_dims else x.shape if self.features is None else (*x.shape[:-1], self.features)
        return torch.full(shape, self.value, dtype=self.dtype, device=x.device)


@dataclass(frozen=True)
class InitialState:
    """``input -> state``: constants in the structure of the library's own initial state."""

    constants: tuple[_Constant, ...]
    structure: Any

    def __call__(self, x: Tensor) -> Any:
        return tree_unflatten([c(x) for c in self.constants], self.structure)


def observe(fallback: Callable[[Tensor], Any]) -> InitialState | None:
    """What `fallback` makes of inputs of two shapes, as constants; None where it is anything else."""
    first, second = torch.zeros(2, 3), torch.zeros(4, 5)
    (a, structure), (b, other) = tree_flatten(fallback(first)), tree_flatten(fallback(second))
    if structure != other or not all(isinstance(leaf, Tensor) for leaf in (*a, *b)):
        return None
    constants = [_constant(p, first, q, second) for p, q in zip(a, b, strict=True)]
    return None if None in constants else InitialState(tuple(c for c in constants if c is not None), structure)


def _constant(a: Tensor, first: Tensor, b: Tensor, second: Tensor) -> _Constant | None:
    values = torch.cat([a.detach().flatten(), b.detach().flatten()]).unique()
    if values.numel() != 1 or a.dtype != b.dtype or a.grad_fn is not None or b.grad_fn is not None:
        return None  # (a state that is learnt has a history)
    value = float(values)
    if a.dim() == b.dim() == 0:
        return _Constant(value, a.dtype, False, None)
    if a.shape == first.shape and b.shape == second.shape:
        return _Constant(value, a.dtype, True, None)
    if a.shape[:-1] == first.shape[:-1] and b.shape[:-1] == second.shape[:-1] and a.shape[-1] == b.shape[-1]:
        return _Constant(value, a.dtype, True, a.shape[-1])
    return None

"""Which calls of a torch-level graph give another name to their first argument's memory."""

from __future__ import annotations

import operator

import torch

#: As methods are called. All elements are still there; `reshape`, `flatten` and `contiguous` are copies where they have to be.
REARRANGING = frozenset(
    [
        "transpose",
        "permute",
        "movedim",
        "swapaxes",
        "swapdims",
        "t",
        "adjoint",
        "view",
        "reshape",
        "flatten",
        "unflatten",
        "squeeze",
        "unsqueeze",
        "contiguous",
    ]
)

_NAMES = REARRANGING | {"narrow", "select", "unbind", "expand", "detach"}

#: Targets of nodes: methods and functions. An index is a view unless it holds tensors or lists.
VIEWS: frozenset[object] = _NAMES | {getattr(torch, n) for n in _NAMES if hasattr(torch, n)} | {operator.getitem}

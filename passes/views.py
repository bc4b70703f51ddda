"""Which calls of a torch-level graph give another name to their first argument's memory, as targets of nodes."""

from __future__ import annotations

import operator

import torch


def _methods_and_functions(*names: str) -> frozenset[object]:
    return frozenset([*names, *(getattr(torch, n) for n in names if hasattr(torch, n))])


#: Sizes, from the same elements; copies where they have to be.
RESIZING = _methods_and_functions("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze")
#: All elements are still there.
REARRANGING = RESIZING | _methods_and_functions(
    "transpose", "permute", "movedim", "swapaxes", "swapdims", "t", "adjoint", "contiguous"
)
#: Each element as often as the given sizes say.
STRETCHING = _methods_and_functions("expand", "expand_as", "broadcast_to")
#: An index is a view unless it holds tensors or lists.
VIEWS = REARRANGING | STRETCHING | _methods_and_functions("narrow", "select", "unbind", "detach") | {operator.getitem}

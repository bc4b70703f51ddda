"""The user's names of values, out of those that Dynamo gives."""

from __future__ import annotations

import re

import torch

from snn_compile.ir.values import base_name

_GENERIC = frozenset(
    {"getitem", "truediv", "arg", "floordiv", "and_", "or_", "invert", "iadd", "isub", "imul", "itruediv", "new", "out"}
    | {n for n in dir(torch.Tensor) if len(n) > 1}
    | {n for n in dir(torch.nn.functional) if len(n) > 1}
)


def nice_name(name: str) -> str:
    """Dynamo's names of operands -> the user's: ``l_self_modules_lif_parameters_w_`` -> ``w``, ``l_x_`` -> ``x``."""
    base = base_name(name)
    found = re.fullmatch(r"[lg]_(.*?)_*", base, re.IGNORECASE)
    if found and found[1]:
        *holders, last = (part.strip("_") for part in re.split(r"_(?:parameters|buffers)_|^self_", found[1]))
        if last.isdigit() and holders:  # of a `ParameterList`
            last = f"{holders[-1].split('_')[-1]}_{last}"
        base = last or base
    return base


def is_generic(name: str) -> bool:
    """A name that Dynamo made up from an op, not one of the user's."""
    return not name or name in _GENERIC or "autograd" in name or "trampoline" in name or name.endswith("_spike")


class Names:
    def __init__(self) -> None:
        self._taken: set[str] = set()

    def unique(self, *wanted: str) -> str:
        """The first of `wanted` that is free, or the last with a number."""
        for name in wanted:
            if name not in self._taken:
                self._taken.add(name)
                return name
        count = 2
        while f"{wanted[-1]}{count}" in self._taken:
            count += 1
        self._taken.add(f"{wanted[-1]}{count}")
        return f"{wanted[-1]}{count}"

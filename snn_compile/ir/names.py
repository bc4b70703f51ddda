"""The user's names of values, out of those that Dynamo gives."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import fx

from snn_compile.ir.values import base_name

_GENERIC = frozenset(
    {"getitem", "truediv", "arg", "floordiv", "and_", "or_", "invert", "iadd", "isub", "imul", "itruediv", "new", "out"}
    | {n for n in dir(torch.Tensor) if len(n) > 1}
    | {n for n in dir(torch.nn.functional) if len(n) > 1}
)


#: What Dynamo's sources put between a module and an attribute of it: ``L['self']._modules['lif']._parameters['w']``.
_HOLDERS = frozenset({"_modules", "_parameters", "_buffers"})


def given_name(placeholder: fx.Node) -> str:
    """The user's name of an input of the graph, as FX can hold it; "" where Dynamo does not say.

    ``L['self']._modules['lif']._parameters['w']`` -> ``w``; ``L['self'].states[0]`` -> ``states0``;
    ``L['self']._parameters['β']`` -> ``uni03B2``, which `nice_name` turns back: names of nodes are ASCII.
    """
    source = getattr(getattr(placeholder.meta.get("grapharg"), "source", None), "name", "")
    path = re.findall(r"\.(\w+)|\['?([^']+?)'?\]", source if isinstance(source, str) else "")
    parts = [part for part in map("".join, path) if part not in _HOLDERS]
    indices = [parts.pop() for _ in parts[1:] if parts[-1].isdigit()]
    name = "".join([*parts[-1:], *reversed(indices)]).strip("_")
    return re.sub(r"_(?=\d+$)", "", "".join(map(_in_ascii, name)))  # (`w_1` would be the second `w`)


def _in_ascii(letter: str) -> str:
    """A letter as font designers name it: ``β -> uni03B2``."""
    if letter.isascii():
        return letter if letter.isalnum() else "_"
    return f"uni{ord(letter):04X}" if letter.isalpha() and ord(letter) <= 0xFFFF else "_"


def nice_name(name: str) -> str:
    """Dynamo's names of operands -> the user's: ``l_self_modules_lif_parameters_w_`` -> ``w``, ``l_x_`` -> ``x``."""
    base = base_name(name)
    found = re.fullmatch(r"[lg]_(.*?)_*", base, re.IGNORECASE)
    if found and found[1]:
        *holders, last = (part.strip("_") for part in re.split(r"_(?:parameters|buffers)_|^self_", found[1]))
        if last.isdigit() and holders:  # of a `ParameterList`
            last = f"{holders[-1].split('_')[-1]}_{last}"
        base = last or base
    return re.sub(r"uni([0-9A-F]{4})", lambda letter: chr(int(letter[1], 16)), base)


def is_generic(name: str) -> bool:
    """A name that Dynamo made up from an op, not one of the user's."""
    return not name or name in _GENERIC or "autograd" in name or "trampoline" in name or name.endswith("_spike")


class Names:
    def __init__(self, taken: Iterable[str] = ()) -> None:
        self._taken = set(taken)

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

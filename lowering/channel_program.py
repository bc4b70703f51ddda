"""A step whose calls only look along one channel, as the writers of its kernels see it.

Values of one step are either whole, ``[N, C, *space]``, or of a channel: ``[C]``, or a shape that stretches it over whole values.
`lowering/cpp/by_channel.py` and `lowering/triton/by_channel.py` turn such a program into one kernel that runs all steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import fx

from snn_compile.ir.stepped import Call, Program, Region, Slot

aten = torch.ops.aten
RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.default)


class Unsupported(Exception):
    """The program is not one that runs channel by channel."""


@dataclass(frozen=True)
class Given:
    """An input slot of the program. ``carry``: an initial value, then `next`; ``before``: a state before each step, as its
    initial value and the series of those after each step; ``series``; ``const``; ``zero``: absent."""

    slot: int
    kind: str
    name: str
    next: int | None = None

    @property
    def tensors(self) -> int:
        return {"zero": 0, "before": 2}.get(self.kind, 1)


@dataclass(frozen=True)
class Wanted:
    """A result: ``series`` (a value of each step), ``final`` (the last value of the carry in `slot`), ``sum`` over the steps."""

    slot: int
    kind: str


def whole_shape(shapes: Iterable[torch.Size]) -> torch.Size:
    """Of values ``[N, C, *space]``, among values of channels. Raises `Unsupported`."""
    whole = [s for s in shapes if len(s) > 1]
    if not whole:
        raise Unsupported
    return max(whole, key=lambda s: (len(s), s.numel()))


def channel_shapes(whole: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Those in which one value a channel stretches over values ``[N, C, *space]``."""
    c, ones = whole[1], (1,) * (len(whole) - 2)
    return (c, *ones), (1, c, *ones)


class Shapes:
    """Which slots of a program are whole values and which are a channel's; `values`: an example of each slot.

    All raise `Unsupported` for a value that is not an fp32 tensor.
    """

    def __init__(self, values: Sequence[Any]) -> None:
        self.values = values
        #: of a whole value
        self.whole = whole_shape(v.shape for v in values if isinstance(v, torch.Tensor))

    def tensor(self, slot: int) -> torch.Tensor:
        value = self.values[slot]
        if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
            raise Unsupported
        return value

    def is_whole(self, slot: int) -> bool:
        return self.tensor(slot).shape == self.whole

    def is_channel(self, slot: int, broadcasts: bool = False) -> bool:
        """One value a channel; `broadcasts`: in a shape that stretches over whole values."""
        shape = tuple(self.tensor(slot).shape)
        return shape in channel_shapes(self.whole) or (not broadcasts and shape == (self.whole[1],))

    def of_region(self, unit: Region) -> bool:
        """Whether a region makes whole values (else a channel's); `Unsupported` where it mixes other shapes in."""
        is_whole = torch.Size(unit.kernel.meta["shape"]) == self.whole
        if not is_whole and not all(self.is_channel(o) for o in unit.outputs):
            raise Unsupported
        for slot in (*unit.inputs, *unit.outputs):
            if self.tensor(slot).dim() and not (is_whole and self.is_whole(slot)) and not self.is_channel(slot, is_whole):
                raise Unsupported
        return is_whole


def slots_read(unit: Region | Call) -> Sequence[int]:
    return unit.inputs if isinstance(unit, Region) else [a.index for a in unit.args if isinstance(a, Slot)]


def summed(call: Call) -> tuple[int, ...]:
    """The slots that the first pass of a batch norm, or of its backward, sums over the channel."""
    count = {aten.native_batch_norm.default: 1, aten.native_batch_norm_backward.default: 2}.get(call.target, 0)  # type: ignore[call-overload]
    return tuple(a.index for a in call.args[:count] if isinstance(a, Slot))


def is_by_channel(program: Program) -> bool:
    """Whether the program's calls look along channels only, one of them at least: the cheap half of what writers find out."""
    targets = {u.target for u in program.units if isinstance(u, Call)}
    norms = {aten.native_batch_norm.default, aten.native_batch_norm_backward.default}
    return bool(targets & norms) and targets <= {getitem, *RESHAPES, *norms}


def examples_of(gm: fx.GraphModule) -> list[Any]:
    """An example of each slot of a program: placeholders and ops in the order of its graph."""
    return [n.meta.get("val") for op in ("placeholder", "call_function") for n in gm.graph.nodes if n.op == op]

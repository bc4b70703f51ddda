"""The text of a kernel, and small things to do with lines of text."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from snn_compile.lowering.triton.memory import Argument


@dataclass(frozen=True)
class KernelText:
    """A kernel's module and how to call it."""

    name: str
    source: str
    arguments: tuple[Argument, ...]
    #: dtypes of the tensors that are read or written lane by lane in every step
    streamed: tuple[torch.dtype, ...]
    #: dtypes of the values a segment keeps in registers for every step; empty where there are no segments
    kept: tuple[torch.dtype, ...] = ()

    @property
    def scratch(self) -> tuple[torch.dtype, ...]:
        """Dtypes of the scratch buffers, each ``[segments - 1, N]``."""
        return tuple(a.dtype for a in self.arguments if a.kind == "scratch" and a.dtype is not None)

    @property
    def accessed(self) -> tuple[torch.dtype, ...]:
        return self.streamed + self.scratch

    @property
    def segmented(self) -> bool:
        return bool(self.kept)


def indent(lines: Iterable[str]) -> list[str]:
    return [f"    {line}" for line in lines]


def mentions(text: str, name: str) -> bool:
    return re.search(rf"(?<![\w.]){re.escape(name)}\b", text) is not None


def defining(definition: str, lines: list[str]) -> list[str]:
    """`lines`, after the definition of a name if they use it."""
    return ([definition] if mentions("\n".join(lines), definition.split(" = ")[0]) else []) + lines


def used(candidates: list[str], body: list[str]) -> list[str]:
    """The assignments among `candidates` that the body, or a later one of them that is used, reads."""
    kept: list[str] = []
    for line in reversed(candidates):
        name = line.split(" = ")[0]
        if mentions("\n".join([*kept, *body]), name):
            kept.insert(0, line)
    return kept

"""The text of a kernel, and small things to do with lines of text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from snn_compile.lowering.triton.literals import TRITON_DTYPES
from snn_compile.lowering.triton.memory import Argument
from snn_compile.lowering.triton.names import comment
from snn_compile.lowering.triton.values import ROUNDING


@dataclass(frozen=True)
class KernelText:
    """A kernel's module and how to call it."""

    name: str
    source: str
    arguments: tuple[Argument, ...]
    #: dtypes of the tensors that are read or written lane by lane in every step
    streamed: tuple[torch.dtype, ...] = ()
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


def module_text(
    name: str, comments: Sequence[str], arguments: Sequence[Argument], constants: Sequence[str], body: Sequence[str]
) -> KernelText:
    """The module around the body of a kernel."""
    text = "\n".join(body)
    header = ["import triton", "import triton.language as tl"]
    if mentions(text, "libdevice"):
        header.append("from triton.language.extra import libdevice")
    helpers = [_helper(d, n) for d, n in ROUNDING.items() if mentions(text, n)]
    parameters = [str(a) for a in arguments] + [f"{c}: tl.constexpr" for c in constants]
    signature = ["@triton.jit", f"def {name}(", *(f"    {p}," for p in parameters), "):"]
    kernel = [*map(comment, comments), *signature, *(f"    {line}" if line else "" for line in body)]
    parts = ["\n".join(header), *helpers, "\n".join(kernel)]
    return KernelText(name, "\n\n\n".join(parts) + "\n", tuple(arguments))


def _helper(dtype: torch.dtype, name: str) -> str:
    return (
        f"@triton.jit\ndef {name}(value):\n"
        f'    """Rounded as eager rounds the result of every op."""\n'
        f"    return value.to({TRITON_DTYPES[dtype]}).to(tl.float32)"
    )


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

"""User text -> names and comments of generated code. Nothing of it can leave its comment or become code."""

from __future__ import annotations

import builtins
import keyword
import re

#: What the generated kernels name themselves.
RESERVED = frozenset({"tl", "triton", "libdevice", "bf16", "fp16", "T", "N", "BLOCK", "INDEX", "SEGMENT"}) | frozenset(
    {"t", "k", "i", "lane", "rest", "inside", "live", "segment", "segments"}
)

_LONGEST = 60
_TAKEN = {*keyword.kwlist, *keyword.softkwlist, *dir(builtins)}


class Names:
    """Hands out identifiers, each once."""

    def __init__(self, taken: frozenset[str] | set[str] = RESERVED) -> None:
        self.taken = set(taken)

    def copy(self) -> Names:
        return Names(self.taken)

    def unique(self, wanted: str) -> str:
        base = name = identifier(wanted)
        i = 1
        while name in self.taken:
            name = f"{base}_{i}"
            i += 1
        self.taken.add(name)
        return name


def identifier(text: str) -> str:
    """An ASCII identifier that is no keyword, builtin or private name."""
    name = re.sub(r"[^0-9A-Za-z_]+", "_", text)[:_LONGEST].strip("_")
    if not name or name[0].isdigit() or name in _TAKEN:
        name = f"value_{name}".rstrip("_")
    return name


def comment(text: str) -> str:
    """One comment line: whatever could end a line or hide text is replaced."""
    line = "".join(c if c.isprintable() else "?" for c in text)[:160].rstrip()
    return f"# {line}" if line else "#"

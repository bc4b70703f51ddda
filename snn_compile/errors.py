"""Every error and every refusal the compiler can utter, with its words in one place."""

from __future__ import annotations

from dataclasses import dataclass


class SnnCompileError(RuntimeError):
    """Base of the errors that `backend="snn"` raises on its own account."""


class OptionError(SnnCompileError, ValueError):
    """An option of `torch.compile(..., options=...)` that does not exist or has a value that is not allowed."""


class VerificationError(SnnCompileError):
    """A graph or a loop broke a rule of the IR: always a bug of a pass, never the user's fault."""


@dataclass(frozen=True)
class Rejection:
    """Why a piece of code was left as it is: what happened, at which node, where in the user's code, what to change."""

    reason: str
    node: str = ""
    location: str = ""
    hint: str = ""
    #: ops of the graph that the refused candidate covers; 0 where that is not known
    ops: int = 0
    #: steps of the loop that was found and refused; 0 where none was found, or their number is symbolic
    steps: int = 0

    def __str__(self) -> str:
        where = f" at {self.location}" if self.location else ""
        what = f" [{self.node}]" if self.node else ""
        hint = f"\n    hint: {self.hint}" if self.hint else ""
        return f"{self.reason}{what}{where}{hint}"


class Reject(Exception):
    """Raised inside a pass to leave the code alone; caught by the pipeline, which keeps the `Rejection`."""

    def __init__(self, reason: str, *, node: object = None, location: str = "", hint: str = "") -> None:
        super().__init__(reason)
        self.rejection = Rejection(reason, str(node) if node is not None else "", location, hint)

"""Value numbering: equal numbers for nodes, of different graphs too, that stand for the same expression."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx


class Numbering:
    def __init__(self) -> None:
        self._numbers: dict[tuple[str, ...], int] = {}
        self._known: dict[fx.Node, int] = {}

    def number(self, node: fx.Node, name: Mapping[fx.Node, str]) -> int:
        """`name` tells which placeholders of two graphs are the same value."""
        if node in self._known:
            return self._known[node]
        if node.op == "placeholder":
            key: tuple[str, ...] = ("placeholder", name[node])
        else:
            args = fx.map_arg((node.args, dict(node.kwargs)), lambda n: f"#{self.number(n, name)}")
            key = (str(node.target), repr(args))
        self._known[node] = self._numbers.setdefault(key, len(self._numbers))
        return self._known[node]

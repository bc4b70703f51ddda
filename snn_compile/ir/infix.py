"""Values of a graph as text, with operators between their operands."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from snn_compile.ir.fire import COMPARISONS, CONSTANTS, is_constant, op_name

SUM, PRODUCT, SIGN, POWER, ATOM = range(1, 6)
_INFIX = {"add": ("+", SUM), "sub": ("-", SUM), "mul": ("*", PRODUCT), "div": ("/", PRODUCT)}
_LOGIC = {"bitwise_and": "and", "logical_and": "and", "bitwise_or": "or", "logical_or": "or"}


def number(value: object) -> str:
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return f"{value:.7g}" if isinstance(value, float) else str(value)


class Infix:
    """Nodes as readable text; `names` are the values that have a line of their own."""

    def __init__(self, names: dict[fx.Node, str]) -> None:
        self.names = names
        self._memo: dict[fx.Node, tuple[str, int]] = {}

    def text(self, value: object, level: int = 0) -> str:
        """`value` as an operand of an operator that binds as tightly as `level`."""
        text, own = self._render(value)
        return f"({text})" if own < level else text

    def atom(self, value: object) -> str:
        """`value` in parentheses, unless it is a name or a call."""
        return self.text(value, ATOM)

    def definition(self, node: fx.Node) -> str:
        """The right-hand side of the node's own line."""
        return self._op(node)[0]

    def _render(self, value: object) -> tuple[str, int]:
        if not isinstance(value, fx.Node):
            text = number(value)
            return text, SIGN if text.startswith("-") else ATOM
        if value in self.names:
            return self.names[value], ATOM
        if value not in self._memo:
            self._memo[value] = (value.name, ATOM) if value.op == "placeholder" else self._op(value)
        return self._memo[value]

    def _op(self, node: fx.Node) -> tuple[str, int]:
        name, args = op_name(node), list[Any](node.args)
        if name == "rsub":
            name, args = "sub", [args[1], args[0], *args[2:]]
        alpha = node.kwargs.get("alpha", args[2] if name in ("add", "sub") and len(args) > 2 else 1)
        if name in _INFIX and alpha == 1 and not node.kwargs.get("rounding_mode"):
            return self._infix(name, args)
        if name == "neg":
            return f"-{self.text(args[0], PRODUCT)}", SIGN
        if name == "pow":
            return f"{self.text(args[0], ATOM)}**{self.text(args[1], ATOM)}", POWER
        if name in COMPARISONS:
            return f"{self.text(args[0], SUM)} {COMPARISONS[name]} {self.text(args[1], SUM)}", 0
        if name in _LOGIC:
            return f"{self.text(args[0], ATOM)} {_LOGIC[name]} {self.text(args[1], ATOM)}", 0
        if name == "_to_copy":
            return self._conversion(args[0])
        if name == "addcmul" and (factor := node.kwargs.get("value", 1)) in (1, -1):
            product, rest = f"{self.text(args[1], PRODUCT)}*{self.text(args[2], PRODUCT)}", self.text(args[0], SUM)
            return f"{product} + {rest}" if factor == 1 else f"{rest} - {product}", SUM
        if name == "reciprocal":
            return f"1/{self.text(args[0], POWER)}", PRODUCT
        return self._call(node, name, args)

    def _infix(self, name: str, args: list[Any]) -> tuple[str, int]:
        sign, level = _INFIX[name]
        if name == "mul" and not isinstance(args[1], fx.Node):
            args = args[1::-1]
        if name == "mul" and args[0] == 1:
            return self._render(args[1])
        if (shorter := self._without_zero(name, args)) is not None:
            return shorter
        left, right = self.text(args[0], level), self.text(args[1], level + (name in ("sub", "div")))
        if name == "add" and right.startswith("-"):
            return f"{left} - {right[1:]}", level
        if right.startswith("-"):
            right = f"({right})"
        return (f"{left} {sign} {right}" if level == SUM else f"{left}{sign}{right}"), level

    def _without_zero(self, name: str, args: list[Any]) -> tuple[str, int] | None:
        """``v - 0`` (a reset to 0) is ``v``, and ``0*s`` nothing."""
        zeros = [self._render(a)[0] == "0" for a in args[:2]]
        if name == "mul" and any(zeros):
            return "0", ATOM
        if name in ("add", "sub") and zeros[1]:
            return self._render(args[0])
        return self._render(args[1]) if name == "add" and zeros[0] else None

    def _conversion(self, source: object) -> tuple[str, int]:
        """A condition as a number: H(u) for ``u >= 0``, ``[u > 0]`` for any other."""
        if not isinstance(source, fx.Node) or source in self.names:
            return self._render(source)
        if op_name(source) == "ge":
            left, right = source.args
            u = self.text(left) if right == 0 else f"{self.text(left, SUM)} - {self.text(right, PRODUCT)}"
            return f"H({u})", ATOM
        if source.meta["val"].dtype is torch.bool:
            return f"[{self.text(source)}]", ATOM
        return self._render(source)

    def _call(self, node: fx.Node, name: str, args: list[Any]) -> tuple[str, int]:
        if is_constant(node):
            value = CONSTANTS[name]
            return self._render(args[value[0]] if isinstance(value, tuple) else value)
        given = {k: v for k, v in node.kwargs.items() if isinstance(v, (int, float, fx.Node))}
        keywords = [f"{k}={self.text(v)}" for k, v in given.items()]
        operands = [self.text(a) for a in args if a is not None]
        return f"{name}({', '.join(operands + keywords)})", ATOM

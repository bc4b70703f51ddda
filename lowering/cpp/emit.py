"""A step graph -> C++ statements: one `const` value a node, in the order of the graph.

    sub = x - v; div = sub/2; h = v + div        ->        const float h = v + (x - v) / 2.0f;

A node that the user did not name and that one other node reads is written where it is read. Rounding to bf16 and fp16
happens at every node, named or not, but gradients (`passes/trace_step.leave_unrounded`): those are rounded where they are stored.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from snn_compile.lowering.cpp.literals import HALVES, HELD, literal
from snn_compile.lowering.cpp.names import Names, words
from snn_compile.lowering.cpp.prelude import SLEEF
from snn_compile.lowering.ops import (
    CONSTANTS,
    TABLE,
    PointwiseOp,
    computation_dtype,
    is_exact,
    operand_nodes,
    opmath,
    overload_name,
    promoted_dtype,
)

#: What Dynamo and ATen call a value that the user did not name.
_NAMES_OF_OPS = words("""
    add sub rsub mul truediv div neg pow abs ge gt lt le eq ne to float double half bfloat16 type where clamp exp log
    tanh sigmoid and or invert and_ or_ relu sqrt detach iadd isub imul itruediv radd rmul rtruediv value getitem
""")

_LONGEST = 56
#: How tightly the infix operators bind.
_PRECEDENCE = {"*": 5, "/": 5, "+": 4, "-": 4, "<": 3, ">": 3, "<=": 3, ">=": 3, "==": 2, "!=": 2}


@dataclass
class Text:
    """C++ text of a value, with the type C++ gives it."""

    code: str
    dtype: torch.dtype
    #: its outermost operator, where that is a plain infix one
    operator: str = ""
    #: to bf16 or fp16, where that is its dtype
    is_rounded: bool = True

    @property
    def operand(self) -> str:
        return self.code if _is_atom(self.code) else f"({self.code})"


@dataclass
class Emitter:
    """The values of one scope; `values` starts with those of the scopes around it."""

    names: Names
    values: dict[fx.Node, Text] = field(default_factory=dict)
    helpers: set[str] = field(default_factory=set)
    #: computed once a kernel: eager's scalar loop, which takes a single element, calls libm and not Sleef
    is_scalar: bool = False

    def statements(self, nodes: Iterable[fx.Node], kept: Iterable[fx.Node]) -> list[str]:
        """Compute `nodes`; those in `kept` get a name whatever they are."""
        kept, lines = set(kept), []
        for node in nodes:
            text = self._expression(node)
            if node in kept or not self._is_inlined(node, text):
                name = self.names.unique(wanted_name(node))
                lines.append(f"const {HELD[text.dtype]} {name} = {text.code};")
                text = Text(name, text.dtype, is_rounded=text.is_rounded)
            self.values[node] = text
        return lines

    def value(self, node: object, dtype: torch.dtype) -> str:
        """A node or a Python number, held as `dtype`."""
        if not isinstance(node, fx.Node):
            return literal(0 if node is None else node, dtype)  # type: ignore[arg-type]
        text = _converted(self.values[node], dtype)
        return text.code if text.is_rounded or dtype not in HALVES else self._rounded(text.code, dtype)

    def _expression(self, node: fx.Node) -> Text:
        name, result = overload_name(node.target), node.meta["val"].dtype
        if name in CONSTANTS:
            return Text(self._rounded(literal(CONSTANTS[name](node), result), result), result)  # type: ignore[arg-type]
        row, compute = TABLE[name], computation_dtype(node)
        operands = []
        for i, operand in enumerate(operand_nodes(node)):
            is_condition = row.promotion is None and i == 0 and name.startswith("where")
            keeps = row.keeps_numbers and i == 1
            operands.append(self._operand(operand, torch.bool if is_condition else promoted_dtype(node), keeps))
        code, operator = _combine(row, operands, node)
        code = self._with_helpers(row, code, compute)
        if name != "_to_copy.default" and HELD[compute] != HELD[result] and result != torch.bool:
            code, operator = f"{HELD[result]}({code})", ""
        if result in HALVES:
            if not node.meta.get("is_rounded", True):
                return Text(code, result, operator, is_rounded=False)
            if not is_exact(node):
                code, operator = self._rounded(code, result), ""
        return Text(code, result, operator)

    def _with_helpers(self, row: PointwiseOp, code: str, compute: torch.dtype) -> str:
        for helper in row.cpp_helpers:
            if f"{helper}(" not in code:
                continue
            if self.is_scalar and helper == "sigmoid":
                code, helper = code.replace("sigmoid(", "sigmoid_of_one("), "sigmoid_of_one"
            elif self.is_scalar and helper not in ("integer_power", "choose"):
                suffix = "f" if compute == torch.float32 else ""
                code = code.replace(f"{helper}(", f"__builtin_{helper[1:]}{suffix}(")
                continue
            self.helpers.add(helper if helper == "integer_power" else f"{helper}.{HELD[compute]}")
        return code

    def _operand(self, operand: object, dtype: torch.dtype, keeps_numbers: bool) -> Text:
        """Converted to the promoted dtype, as eager does before it widens bf16 and fp16 to compute."""
        if not isinstance(operand, fx.Node):
            return Text(literal(operand, opmath(dtype) if keeps_numbers else dtype), dtype)  # type: ignore[arg-type]
        text = self.values[operand]
        is_number = operand.meta["val"].dim() == 0
        if dtype in HALVES and text.dtype not in (dtype, torch.bool) and not (keeps_numbers and is_number):
            return Text(self._rounded(_converted(text, dtype).code, dtype), dtype)
        return _converted(text, dtype)

    def _rounded(self, code: str, dtype: torch.dtype) -> str:
        if dtype not in HALVES:
            return code
        self.helpers.add(HALVES[dtype])
        return f"round_{HALVES[dtype]}({code})"

    def _is_inlined(self, node: fx.Node, text: Text) -> bool:
        if _is_named_by_user(node) or len(text.code) > _LONGEST:
            return False
        if overload_name(node.target) in CONSTANTS:
            return True
        if len(node.users) != 1:
            return False
        (user,) = node.users
        return user.op == "call_function" and _reads_once(user, node)


def _apply(row: PointwiseOp, operands: list[str], node: fx.Node) -> str:
    return row.cpp.format(*operands) if isinstance(row.cpp, str) else row.cpp(operands, node)


def _combine(row: PointwiseOp, operands: list[Text], node: fx.Node) -> tuple[str, str]:
    """The row applied to its operands, with no parentheses that C++ does not need, and its operator if it is infix."""
    code = _apply(row, [o.operand for o in operands], node)
    if len(operands) == 2:
        left, right = operands
        for operator, tightness in _PRECEDENCE.items():
            if code != f"{left.operand} {operator} {right.operand}":
                continue
            a = left.code if _PRECEDENCE.get(left.operator, 0) >= tightness > 3 else left.operand
            b = right.code if _PRECEDENCE.get(right.operator, 0) > tightness > 3 else right.operand
            if tightness <= 3:  # a comparison: arithmetic binds tighter
                a = left.code if _PRECEDENCE.get(left.operator, 0) > 3 else a
                b = right.code if _PRECEDENCE.get(right.operator, 0) > 3 else b
            return f"{a} {operator} {b}", operator
    if len(operands) == 1 and code.endswith(f"({operands[0].operand})"):
        code = f"{code.removesuffix(operands[0].operand + ')')}{operands[0].code})"  # f((a + b)) -> f(a + b)
    return code, ""


def _is_atom(code: str) -> bool:
    """An identifier, a number, or one call."""
    call = re.fullmatch(r"\w*\((.*)\)", code)
    if not call:
        return re.fullmatch(r"[\w.]+|\d[\w.]*e[+-]\w+", code) is not None
    depth = 0
    for c in call[1]:
        depth += (c == "(") - (c == ")")
        if depth < 0:
            return False
    return True


def _reads_once(user: fx.Node, node: fx.Node) -> bool:
    """Whether the row of `user` mentions the operand `node` a single time."""
    if overload_name(user.target) not in TABLE:
        return False
    operands = operand_nodes(user)
    marks = [f"<{i}>" for i in range(len(operands))]
    code = _apply(TABLE[overload_name(user.target)], marks, user)
    return sum(code.count(mark) for mark, operand in zip(marks, operands, strict=True) if operand is node) == 1


def _converted(text: Text, dtype: torch.dtype) -> Text:
    """Held as `dtype` (the C++ type only: no rounding to bf16 or fp16)."""
    source, target = HELD[text.dtype], HELD[dtype]
    if source == target:
        return text
    if target == "uint8_t" and text.dtype.is_floating_point:
        return Text(f"uint8_t(int64_t({text.code}))", dtype)
    return Text(f"{target}({text.code})", dtype)


def _is_named_by_user(node: fx.Node) -> bool:
    name = node.meta.get("user_name") or ""
    return bool(name) and name not in _NAMES_OF_OPS


def wanted_name(node: fx.Node) -> str:
    return node.meta.get("user_name") or node.name.strip("_")


# ------------------------------------------------------------------------------------------------------ graph queries


def results(graph: fx.Graph) -> list[object]:
    """What the graph returns: nodes, numbers, None."""
    (output,) = (n for n in graph.nodes if n.op == "output")
    return list(output.args[0])  # type: ignore[arg-type]


def needed(graph: fx.Graph, wanted: Iterable[object]) -> list[fx.Node]:
    """The nodes that `wanted` depends on, placeholders included, in the order of the graph."""
    live: set[fx.Node] = {n for n in wanted if isinstance(n, fx.Node)}
    for node in reversed(graph.nodes):
        if node in live:
            live.update(node.all_input_nodes)
    return [n for n in graph.nodes if n in live]


def levels(nodes: Iterable[fx.Node], of_placeholder: Mapping[fx.Node, int]) -> dict[fx.Node, int]:
    """How far in a node must be computed: the highest level among what it reads (a number: the lowest, 0)."""
    level: dict[fx.Node, int] = {}
    for node in nodes:
        level[node] = (
            of_placeholder[node] if node.op == "placeholder" else max((level[i] for i in node.all_input_nodes), default=0)
        )
    return level


def is_expensive(node: fx.Node) -> bool:
    """Worth being computed once a lane instead of once a step and lane."""
    return overload_name(node.target).split(".")[0] in _EXPENSIVE


_EXPENSIVE = words("div sqrt rsqrt reciprocal sigmoid").union(SLEEF)

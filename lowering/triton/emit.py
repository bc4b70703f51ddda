"""FX graph of pointwise ATen -> lines of Triton, one rounding an op.

    %sub = aten.sub(%x, %v); %div = aten.div(%sub, 2.0); %h = aten.add(%v, %div)

    ->  h = v + (x - v) * 0.5

A value with a name of the user's, or with several uses, gets a line; any other is written where it is used. bf16 and
fp16 values live in fp32 registers and are rounded after every op, as eager does, but gradients: those where they are stored.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import fx
from torch._prims_common import ELEMENTWISE_TYPE_PROMOTION_KIND as Kind
from torch._prims_common import elementwise_dtypes

from snn_compile.lowering.ops import CONSTANTS, TABLE, is_exact, operand_nodes, opmath, overload_name
from snn_compile.lowering.triton.analysis import count_users, template_of
from snn_compile.lowering.triton.literals import TRITON_DTYPES
from snn_compile.lowering.triton.memory import as_block
from snn_compile.lowering.triton.names import Names
from snn_compile.lowering.triton.values import Value, convert, fill, number

#: Eager hands a Python number to these in the computation dtype (opmath), to all others in the promoted dtype.
_OPMATH_SCALARS = {"add", "sub", "rsub", "mul", "div"}

_LONGEST_EXPRESSION = 40


@dataclass(frozen=True)
class Statement:
    """One line: ``target = text``, or, with no target, a store."""

    target: str
    text: str
    uses: frozenset[str]

    def __str__(self) -> str:
        return f"{self.target} = {self.text}" if self.target else self.text


Environment = dict[fx.Node, Value]


class Emitter:
    """Appends statements for nodes; `env` knows what nodes already have."""

    def __init__(self, names: Names, env: Environment) -> None:
        self.names = names
        self.env = dict(env)
        self.statements: list[Statement] = []

    def emit(self, nodes: Sequence[fx.Node], results: Iterable[fx.Node], *, named: bool = False) -> None:
        """`nodes`: in topological order, all that `results` need and `env` lacks; `named`: each result gets a line."""
        results = list(results)
        users = count_users(nodes, results)
        for node in nodes:
            if node in self.env:
                continue
            value = self._value(node)
            name = user_name(node)
            alone = users[node] == 1 and not name and len(value.text) <= _LONGEST_EXPRESSION
            alone = alone and not (named and node in results)
            if value.number is None and not (alone or re.fullmatch(r"\w+", value.text)):
                value = self.assign(name or op_name(node), value)
            self.env[node] = value

    def assign(self, wanted: str, value: Value) -> Value:
        for known in self.statements:  # the step and its backward share what is invariant
            if known.target and known.text == value.text:
                return Value.variable(known.target, value.dtype, block=value.block)
        target = self.names.unique(wanted)
        self.statements.append(Statement(target, value.text, value.uses))
        return Value.variable(target, value.dtype, block=value.block)

    def store(self, text: str, *values: Value) -> None:
        self.statements.append(Statement("", text, frozenset().union(*(v.uses for v in values))))

    # ------------------------------------------------------------------------------------------------- one op

    def _value(self, node: fx.Node) -> Value:
        name = overload_name(node.target)
        dtype = node.meta["val"].dtype
        if name in CONSTANTS:
            return number(CONSTANTS[name](node), dtype)  # type: ignore[arg-type]
        given = operand_nodes(node)
        wanted = _operand_dtypes(node, given)
        template = template_of(node, given)
        operands = self._operands(node, template, given, wanted)
        text = fill(template, operands)
        common = wanted[-1]
        result = torch.bool if TABLE[name].promotion == Kind.ALWAYS_BOOL else common
        value = Value(
            text,
            opmath(result),
            block=any(o.block for o in operands),
            uses=frozenset().union(*(o.uses for o in operands)),
        )
        if name == "_to_copy.default" or is_exact(node) or not node.meta.get("is_rounded", True):
            return replace(value, dtype=dtype)
        return convert(value, dtype)

    def _operands(self, node: fx.Node, template: str, given: list[object], wanted: list[torch.dtype]) -> list[Value]:
        op = overload_name(node.target).split(".")[0]
        values = [self.env[o] if isinstance(o, fx.Node) else None for o in given]
        arithmetic = "tl." not in template and "libdevice." not in template
        # Triton compares with a literal as with an argument of a function: in fp32
        arithmetic = arithmetic and not (wanted[-1] == torch.float64 and node.meta["val"].dtype == torch.bool)
        typed = any(v is not None and v.number is None and d == wanted[-1] for v, d in zip(values, wanted, strict=True))
        operands = []
        for value, operand, dtype in zip(values, given, wanted, strict=True):
            exact = opmath(dtype) if value is None and op in _OPMATH_SCALARS else dtype
            if value is None or value.number is not None:
                n = operand if value is None else value.number
                operand_value = number(n, exact, arithmetic=arithmetic and typed)  # type: ignore[arg-type]
                bare = not arithmetic and op == "where" and opmath(dtype) in (torch.float32, torch.int32, torch.bool)
                if not typed and not bare:  # nothing else tells Triton the dtype
                    text = f"tl.full((), {operand_value.text}, {TRITON_DTYPES[opmath(dtype)]})"
                    operand_value = replace(operand_value, text=text)
                    typed = dtype == wanted[-1]
                operands.append(operand_value)
            else:
                operands.append(convert(value, dtype))
        return operands


def _operand_dtypes(node: fx.Node, given: list[object]) -> list[torch.dtype]:
    """To which dtype eager converts each operand, before widening for the computation; the promoted dtype is last."""
    row = TABLE[overload_name(node.target)]
    if row.promotion is None:  # where(condition, a, b), _to_copy(a)
        result = node.meta["val"].dtype
        return [torch.bool] * (len(given) == 3) + [result] * (2 if len(given) == 3 else 1)
    values = [o.meta["val"] if isinstance(o, fx.Node) else o for o in given]
    kind = Kind.DEFAULT if row.promotion == Kind.ALWAYS_BOOL else row.promotion
    _, common = elementwise_dtypes(*values, type_promotion_kind=kind)
    return [common] * len(given)


def user_name(node: fx.Node) -> str:
    """The variable of the user's code; the empty string for a temporary that only an operator names."""
    name = node.meta.get("user_name") or ""
    op = overload_name(node.target).split(".")[0]
    return "" if name in _OPERATOR_NAMES or name == op else name


#: How Dynamo names what has no name in the user's code.
_OPERATOR_NAMES = frozenset(("add", "sub", "mul", "div", "truediv", "pow", "neg", "to", "float", "type_as", "invert")) | {
    *("iadd", "isub", "imul", "itruediv", "ge", "gt", "le", "lt", "eq", "ne", "and_", "or_", "xor", "value"),
}


def op_name(node: fx.Node) -> str:
    name = overload_name(node.target).split(".")[0].strip("_")
    return {"to_copy": "converted", "where": "selected", "rsub": "sub"}.get(name, name)


def update(statements: Sequence[Statement], updates: Sequence[tuple[str, Value]]) -> list[Statement]:
    """`statements`, then all `updates` at once.

    An update whose value has a line of its own, after which nothing reads the old value, happens in that line.
    """
    statements, pending = list(statements), [(name, value) for name, value in updates if value.text != name]
    for name, value in list(pending):
        at = next((i for i, s in enumerate(statements) if s.target == value.text and value.block), None)
        if at is None:
            continue
        readers = [s.uses for s in statements[at + 1 :]] + [v.uses for n, v in pending if n != name]
        if any(name in uses for uses in readers):
            continue
        statements[at] = replace(statements[at], target=name)
        statements[at + 1 :] = [_rename(s, value.text, name) for s in statements[at + 1 :]]
        pending = [(n, _rename(v, value.text, name)) for n, v in pending if n != name]
    lines = [Statement(name, as_block(value), value.uses) for name, value in pending]
    if any(s.target in later.uses for i, s in enumerate(lines) for later in lines[i + 1 :]):
        together = ", ".join(s.target for s in lines), ", ".join(s.text for s in lines)
        lines = [Statement(*together, frozenset().union(*(s.uses for s in lines)))]
    return statements + lines


Text = TypeVar("Text", Statement, Value)


def _rename(what: Text, old: str, new: str) -> Text:
    if old not in what.uses:
        return what
    text, uses = re.sub(rf"\b{old}\b", new, what.text), what.uses - {old} | {new}
    return replace(what, text=text, uses=uses)

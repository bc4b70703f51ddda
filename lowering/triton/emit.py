"""FX graph of pointwise ATen -> lines of Triton, one rounding an op.

    %sub = aten.sub(%x, %v); %div = aten.div(%sub, 2.0); %h = aten.add(%v, %div)

    ->  h = v + (x - v) * 0.5

A value with a name of the user's, or with several uses, gets a line; any other is written where it is used. bf16 and
fp16 values live in fp32 registers and are rounded after every op, as eager does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx
from torch._prims_common import ELEMENTWISE_TYPE_PROMOTION_KIND as Kind
from torch._prims_common import elementwise_dtypes

from snn_compile.lowering.ops import CONSTANTS, TABLE, operand_nodes, opmath, overload_name
from snn_compile.lowering.triton.literals import TRITON_DTYPES, Number, literal
from snn_compile.lowering.triton.names import Names

#: Rounding helpers of the generated modules, for the dtypes that live in fp32.
ROUNDING = {torch.bfloat16: "bf16", torch.float16: "fp16"}

#: Eager hands a Python number to these in the computation dtype (opmath), to all others in the promoted dtype.
_OPMATH_SCALARS = {"add", "sub", "rsub", "mul", "div"}
#: Results that are one of the operands, or exact in its dtype: nothing to round.
_EXACT_IN_DTYPE = {"neg", "abs", "sign", "sgn", "relu", "maximum", "minimum", "where", "heaviside"}
_EXACT_IN_DTYPE |= {"floor", "ceil", "trunc", "round"}

_LONGEST_EXPRESSION = 40


@dataclass(frozen=True)
class Value:
    """What a node is in the generated code."""

    text: str
    #: as eager has it; in registers it is `opmath(dtype)`
    dtype: torch.dtype
    #: one element a lane (else one for all)
    block: bool = True
    #: a Python number
    number: Number | None = None
    #: names of variables in the text
    uses: frozenset[str] = frozenset()

    @staticmethod
    def variable(name: str, dtype: torch.dtype, *, block: bool = True) -> Value:
        return Value(name, dtype, block, uses=frozenset({name}))


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
        users = _count_users(nodes, results)
        for node in nodes:
            if node in self.env:
                continue
            value = self._value(node)
            name = user_name(node)
            alone = users[node] == 1 and not name and len(value.text) <= _LONGEST_EXPRESSION
            alone = alone and not (named and node in results)
            if value.number is None and not (alone or re.fullmatch(r"\w+", value.text)):
                value = self.assign(name or _op_name(node), value)
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
        template = _template(node, given)
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
        op = name.split(".")[0]
        if op == "_to_copy" or (op in _EXACT_IN_DTYPE and result == dtype):
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


def _template(node: fx.Node, given: Sequence[object]) -> str:
    """The op's expression, with ``{i}`` for its operands."""
    expression = TABLE[overload_name(node.target)].triton
    return expression if isinstance(expression, str) else expression([f"{{{i}}}" for i in range(len(given))], node)


def number(value: Number, dtype: torch.dtype, *, arithmetic: bool = False) -> Value:
    """A literal: rounded to `dtype`, spelled in the dtype of registers."""
    if dtype in ROUNDING:
        value = torch.tensor(value, dtype=torch.float64).to(dtype).item()
    text = literal(value, opmath(dtype), arithmetic=arithmetic)
    return Value(text, dtype, block=False, number=value)


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


def convert(value: Value, dtype: torch.dtype) -> Value:
    """The value in `dtype`, as eager converts: once through every dtype that eager goes through."""
    if value.dtype == dtype or (value.dtype in ROUNDING and dtype == opmath(value.dtype)):
        return replace(value, dtype=dtype)
    if value.number is not None:
        return number(value.number, dtype)
    source, target = opmath(value.dtype), opmath(dtype)
    text = value.text
    if source != target:
        text = text if precedence(text) == _ATOM else f"({text})"
        if source.is_floating_point and target == torch.uint8:
            text += ".to(tl.int64)"  # c10::static_cast_with_inter_type
        text = f"{text}.to({TRITON_DTYPES[target]})"
    if dtype in ROUNDING and value.dtype != torch.bool:
        text = f"{ROUNDING[dtype]}({text})"
    return replace(value, text=text, dtype=dtype)


def fill(template: str, operands: Sequence[Value]) -> str:
    """`template` with the operands in place, in parentheses where they need some."""
    outer = precedence(template)

    def field(match: re.Match[str]) -> str:
        text, inner = operands[int(match[1])].text, precedence(operands[int(match[1])].text)
        before, after = template[: match.start()], template[match.end() :]
        delimited = (not before or before.endswith(("(", ", "))) and (not after or after.startswith((")", ",")))
        if delimited or inner == _ATOM:
            return text
        leftmost = not before and inner == outer and inner >= _SUM
        return text if precedence(before + "x" + after) == outer < inner or leftmost else f"({text})"

    return re.sub(r"\{(\d+)\}", field, template)


_COMPARISON, _BITS, _SUM, _PRODUCT, _SIGN, _ATOM = range(6)
_BINARY = {"*": _PRODUCT, "/": _PRODUCT, "//": _PRODUCT, "%": _PRODUCT, "+": _SUM, "-": _SUM} | dict.fromkeys(
    "&|^", _BITS
)


def precedence(text: str) -> int:
    """Of the operator that binds least among those outside of all parentheses."""
    flat = text
    while flat != (flat := re.sub(r"\([^()]*\)|\[[^\[\]]*\]", "", flat)):
        pass
    operators = re.findall(r" (\S+) ", flat)
    sign = _SIGN if flat.startswith(("-", "~")) else _ATOM
    return min([_BINARY.get(o, _COMPARISON) for o in operators], default=sign)


# ----------------------------------------------------------------------------------------------------------- analysis


def output_nodes(graph: fx.Graph) -> list[fx.Node | None]:
    return list(next(iter(reversed(graph.nodes))).args[0])  # type: ignore[arg-type]


def inputs(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values the generated code of this node reads."""
    if node.op != "call_function" or overload_name(node.target) in CONSTANTS:
        return []
    return [o for o in operand_nodes(node) if isinstance(o, fx.Node)]


def needed(graph: fx.Graph, results: Iterable[fx.Node | None]) -> list[fx.Node]:
    """All nodes that `results` depend on, themselves included, in order."""
    wanted = {r for r in results if r is not None}
    for node in reversed(graph.nodes):
        if node in wanted:
            wanted.update(inputs(node))
    return [n for n in graph.nodes if n in wanted]


def invariant(nodes: Iterable[fx.Node], consts: Iterable[fx.Node]) -> list[fx.Node]:
    """The nodes among `nodes` that the time loop does not change: functions of `consts` alone."""
    fixed = set(consts)
    found = []
    for node in nodes:
        if node.op == "call_function" and all(i in fixed for i in inputs(node)):
            fixed.add(node)
            found.append(node)
    return found


def _count_users(nodes: Sequence[fx.Node], results: Iterable[fx.Node]) -> dict[fx.Node, int]:
    """How often the text of each node would appear, were it written where it is used."""
    count = dict.fromkeys(nodes, 0)
    for node in nodes:
        if not inputs(node):
            continue
        given = operand_nodes(node)
        template = _template(node, given)
        for i, operand in enumerate(given):
            if isinstance(operand, fx.Node) and operand in count:
                count[operand] += template.count(f"{{{i}}}")
    for result in results:
        if result in count:
            count[result] += 1
    return count


def user_name(node: fx.Node) -> str:
    """The variable of the user's code; the empty string for a temporary that only an operator names."""
    name = node.meta.get("user_name") or ""
    op = overload_name(node.target).split(".")[0]
    return "" if name in _OPERATOR_NAMES or name == op else name


#: How Dynamo names what has no name in the user's code.
_OPERATOR_NAMES = frozenset(
    ("add", "sub", "mul", "div", "truediv", "pow", "neg", "to", "float", "type_as", "invert")
) | {
    *("iadd", "isub", "imul", "itruediv", "ge", "gt", "le", "lt", "eq", "ne", "and_", "or_", "xor", "value"),
}


def _op_name(node: fx.Node) -> str:
    name = overload_name(node.target).split(".")[0].strip("_")
    return {"to_copy": "converted", "where": "selected", "rsub": "sub"}.get(name, name)

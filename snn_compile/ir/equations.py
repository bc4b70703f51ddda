"""The step of a recurrence as equations in the user's names, for reports and for the comments of generated kernels.

    h = v + (x - v)/2        charge: what is compared with the threshold
    s = H(h - 1)             fire:   the spike; H(u) is 1 where u >= 0, else 0
    v' = h*(1 - s)           reset:  the next state

This is text and analysis, never arithmetic: kernels are generated from the graph itself. `equations` is cheap and needs
no sympy; `is_affine` and `surrogate` simplify with sympy, which is imported when they are called and given up after a
time cap.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from snn_compile.ir.recurrence import Carry, Recurrence
from snn_compile.ir.values import base_name

#: Longer than this, a value gets a line of its own; longer than `MAX_LINE`, a line is cut.
MAX_INLINE, MAX_LINE = 60, 150
#: sympy is not asked about larger expressions, nor waited for longer.
MAX_SYMBOLIC_NODES, MAX_SECONDS = 200, 2.0

COMPARISONS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "eq": "==", "ne": "!="}
_SUM, _PRODUCT, _SIGN, _POWER, _ATOM = range(1, 6)
_INFIX = {"add": ("+", _SUM), "sub": ("-", _SUM), "mul": ("*", _PRODUCT), "div": ("/", _PRODUCT)}
_LOGIC = {"bitwise_and": "and", "logical_and": "and", "bitwise_or": "or", "logical_or": "or"}


@dataclass(frozen=True)
class Equation:
    role: str  # "charge", "fire", "reset", "output" or "" for what lies between
    name: str
    text: str

    def __str__(self) -> str:
        return f"{self.name} = {self.text}"


@dataclass(frozen=True)
class Fire:
    """A spike of the step: ``spike = H(argument)``, from the `charge` that is compared with the threshold."""

    spike: fx.Node
    compared: fx.Node
    argument: fx.Node
    charge: fx.Node


def equations(recurrence: Recurrence) -> list[Equation]:
    """The step, one equation a named value; per-op text where anything is not understood."""
    try:
        return _Writer(recurrence).equations()
    except Exception:  # a report must never stop a compilation
        return [
            Equation("", n.name, f"{op_name(n)}({', '.join(map(str, n.args))})"[:MAX_LINE])
            for n in recurrence.step.graph.nodes
            if n.op == "call_function"
        ]


# ------------------------------------------------------------------------------------------------------------ structure


def op_name(node: object) -> str:
    """``aten.add.Tensor`` -> ``add``"""
    target = getattr(node, "target", "")
    return target._schema.name.split("::")[1] if isinstance(target, torch._ops.OpOverload) else str(target)


def results(gm: fx.GraphModule) -> list[Any]:
    return list(gm.graph.output_node().args[0])  # type: ignore[arg-type]


def find_fires(gm: fx.GraphModule) -> list[Fire]:
    """Comparisons with a threshold whose result is used as a number, in order."""
    fires = []
    for node in gm.graph.nodes:
        if op_name(node) == "heaviside":
            fires.append(_fire(node, node, node.args[0], 0))
        if op_name(node) not in ("ge", "gt", "le", "lt"):
            continue
        left, right = node.args[:2]
        if not isinstance(left, fx.Node) or not left.meta["val"].is_floating_point():
            continue
        spike = next((u for u in node.users if op_name(u) == "_to_copy" or _chooses_numbers(u)), None)
        if spike is not None and left not in [f.spike for f in fires]:
            fires.append(_fire(spike, node, left, right))
    return fires


def _chooses_numbers(node: fx.Node) -> bool:
    """``where(condition, 1, 0)``"""
    return op_name(node) == "where" and all(not isinstance(a, fx.Node) or not a.all_input_nodes for a in node.args[1:])


def _fire(spike: fx.Node, compared: fx.Node, left: Any, right: object) -> Fire:
    charge = left
    if right == 0 and op_name(left) == "sub" and isinstance(left.args[0], fx.Node):
        charge = left.args[0]
    elif right == 0 and op_name(left) in ("div", "mul") and op_name(left.args[0]) == "sub":
        charge = left.args[0].args[0]  # (h - threshold)/threshold  # type: ignore[union-attr, assignment]
    return Fire(spike, compared, left, charge if isinstance(charge, fx.Node) else left)


def reached(nodes: Iterable[fx.Node], stop: Callable[[fx.Node], bool] = lambda n: False) -> set[fx.Node]:
    """All nodes that depend on `nodes`, which are included."""
    found, frontier = set(nodes), list(nodes)
    while frontier:
        for user in frontier.pop().users:
            if user not in found and not stop(user):
                found.add(user)
                frontier.append(user)
    return found


def spike_of_state(recurrence: Recurrence) -> list[Fire]:
    """The fires whose argument depends on a state or an input, not only on constants."""
    placeholders = [n for n in recurrence.step.graph.nodes if n.op == "placeholder"]
    varying = reached(placeholders[: len(recurrence.carries) + len(recurrence.xs)])
    return [f for f in find_fires(recurrence.step) if f.argument in varying]


# -------------------------------------------------------------------------------------------------------------- names


_GENERIC = frozenset(
    {"getitem", "truediv", "arg", "floordiv", "and_", "or_", "invert", "iadd", "isub", "imul", "itruediv", "new", "out"}
    | {n for n in dir(torch.Tensor) if len(n) > 1}
    | {n for n in dir(torch.nn.functional) if len(n) > 1}
)


def nice_name(name: str) -> str:
    """Dynamo's names of operands -> the user's: ``l_self_modules_lif_parameters_w_`` -> ``w``, ``l_x_`` -> ``x``."""
    base = base_name(name)
    found = re.fullmatch(r"[lg]_(.*?)_*", base, re.IGNORECASE)
    if found and found[1]:
        *holders, last = (part.strip("_") for part in re.split(r"_(?:parameters|buffers)_|^self_", found[1]))
        if last.isdigit() and holders:  # of a `ParameterList`
            last = f"{holders[-1].split('_')[-1]}_{last}"
        base = last or base
    return base


def _specs(recurrence: Recurrence) -> list[Any]:
    return [*recurrence.carries, *recurrence.xs, *recurrence.consts]


def is_generic(name: str) -> bool:
    """A name that Dynamo made up from an op, not one of the user's."""
    return not name or name in _GENERIC or "autograd" in name or "trampoline" in name or name.endswith("_spike")


class _Names:
    def __init__(self) -> None:
        self._taken: set[str] = set()

    def unique(self, *wanted: str) -> str:
        """The first of `wanted` that is free, or the last with a number."""
        for name in wanted:
            if name not in self._taken:
                self._taken.add(name)
                return name
        count = 2
        while f"{wanted[-1]}{count}" in self._taken:
            count += 1
        self._taken.add(f"{wanted[-1]}{count}")
        return f"{wanted[-1]}{count}"


# ---------------------------------------------------------------------------------------------------- infix


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
        return self.text(value, _ATOM)

    def definition(self, node: fx.Node) -> str:
        """The right-hand side of the node's own line."""
        return self._op(node)[0]

    def _render(self, value: object) -> tuple[str, int]:
        if not isinstance(value, fx.Node):
            text = number(value)
            return text, _SIGN if text.startswith("-") else _ATOM
        if value in self.names:
            return self.names[value], _ATOM
        if value not in self._memo:
            self._memo[value] = (value.name, _ATOM) if value.op == "placeholder" else self._op(value)
        return self._memo[value]

    def _op(self, node: fx.Node) -> tuple[str, int]:
        name, args = op_name(node), list[Any](node.args)
        if name == "rsub":
            name, args = "sub", [args[1], args[0], *args[2:]]
        alpha = node.kwargs.get("alpha", args[2] if name in ("add", "sub") and len(args) > 2 else 1)
        if name in _INFIX and alpha == 1 and not node.kwargs.get("rounding_mode"):
            return self._infix(name, args)
        if name == "neg":
            return f"-{self.text(args[0], _PRODUCT)}", _SIGN
        if name == "pow":
            return f"{self.text(args[0], _ATOM)}**{self.text(args[1], _ATOM)}", _POWER
        if name in COMPARISONS:
            return f"{self.text(args[0], _SUM)} {COMPARISONS[name]} {self.text(args[1], _SUM)}", 0
        if name in _LOGIC:
            return f"{self.text(args[0], _ATOM)} {_LOGIC[name]} {self.text(args[1], _ATOM)}", 0
        if name == "_to_copy":
            return self._conversion(args[0])
        if name == "addcmul" and (factor := node.kwargs.get("value", 1)) in (1, -1):
            product, rest = f"{self.text(args[1], _PRODUCT)}*{self.text(args[2], _PRODUCT)}", self.text(args[0], _SUM)
            return f"{product} + {rest}" if factor == 1 else f"{rest} - {product}", _SUM
        if name == "reciprocal":
            return f"1/{self.text(args[0], _POWER)}", _PRODUCT
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
        return (f"{left} {sign} {right}" if level == _SUM else f"{left}{sign}{right}"), level

    def _without_zero(self, name: str, args: list[Any]) -> tuple[str, int] | None:
        """``v - 0`` (a reset to 0) is ``v``, and ``0*s`` nothing."""
        zeros = [self._render(a)[0] == "0" for a in args[:2]]
        if name == "mul" and any(zeros):
            return "0", _ATOM
        if name in ("add", "sub") and zeros[1]:
            return self._render(args[0])
        return self._render(args[1]) if name == "add" and zeros[0] else None

    def _conversion(self, source: object) -> tuple[str, int]:
        """A condition as a number: H(u) for ``u >= 0``, ``[u > 0]`` for any other."""
        if not isinstance(source, fx.Node) or source in self.names:
            return self._render(source)
        if op_name(source) == "ge":
            left, right = source.args
            u = self.text(left) if right == 0 else f"{self.text(left, _SUM)} - {self.text(right, _PRODUCT)}"
            return f"H({u})", _ATOM
        if source.meta["val"].dtype is torch.bool:
            return f"[{self.text(source)}]", _ATOM
        return self._render(source)

    def _call(self, node: fx.Node, name: str, args: list[Any]) -> tuple[str, int]:
        constants = {"zeros_like": 0, "ones_like": 1, "zeros": 0, "ones": 1, "new_zeros": 0, "new_ones": 1}
        if name in constants:
            return number(constants[name]), _ATOM
        if name in ("full_like", "full", "scalar_tensor", "new_full"):
            return self._render(args[{"scalar_tensor": 0, "new_full": 2}.get(name, 1)])
        given = {k: v for k, v in node.kwargs.items() if isinstance(v, (int, float, fx.Node))}
        keywords = [f"{k}={self.text(v)}" for k, v in given.items()]
        operands = [self.text(a) for a in args if a is not None]
        return f"{name}({', '.join(operands + keywords)})", _ATOM


# ---------------------------------------------------------------------------------------------------- lines


def writer(recurrence: Recurrence) -> Infix:
    """Writes the values of the step in the names that `equations` gives them."""
    return _Writer(recurrence).infix


class _Writer:
    """Decides which values get a line, and their names."""

    def __init__(self, recurrence: Recurrence) -> None:
        self.recurrence = recurrence
        self.names: dict[fx.Node, str] = {}
        self.roles: dict[fx.Node, str] = {}
        self.aliases: list[tuple[str, fx.Node]] = []
        self._unique = _Names()
        nodes = list(recurrence.step.graph.nodes)
        self.placeholders = [n for n in nodes if n.op == "placeholder"]
        self.ops = [n for n in nodes if n.op == "call_function"]
        self.fires = spike_of_state(recurrence)
        self._name_operands()
        self._name_states()
        self._name_fires()
        self._name_outputs()
        self._name_values()
        self.infix = Infix(self.names)

    def _name_operands(self) -> None:
        r = self.recurrence
        for node, spec in zip(self.placeholders, _specs(r), strict=True):
            name = nice_name(spec.name)
            self.names[node] = self._unique.unique("state" if isinstance(spec, Carry) and is_generic(name) else name)

    def _name_states(self) -> None:
        carries = self.placeholders[: len(self.recurrence.carries)]
        for carry, value in zip(carries, results(self.recurrence.step), strict=False):
            name = self._unique.unique(f"{self.names[carry]}'")
            if value in self.names:
                self.aliases.append((name, value))  # type: ignore[arg-type]
            elif isinstance(value, fx.Node):
                self.names[value], self.roles[value] = name, "reset"

    def _name_fires(self) -> None:
        for fire in self.fires:
            if fire.charge in self.ops:
                self._name(fire.charge, "charge", "h")
            self._name(fire.spike, "fire", "s")

    def _name(self, node: fx.Node, role: str, default: str) -> None:
        if node not in self.names:
            own = nice_name(node.meta.get("user_name") or "")
            self.names[node] = self._unique.unique(*([] if is_generic(own) else [own]), default)
        if node in self.ops and self.roles.get(node) != "fire":
            self.roles[node] = role

    def _name_outputs(self) -> None:
        values = results(self.recurrence.step)[len(self.recurrence.carries) :]
        for spec, value in zip(self.recurrence.ys, values, strict=True):
            if isinstance(value, fx.Node) and value not in self.names:
                own = nice_name(spec.name)
                self.names[value] = self._unique.unique(*([] if is_generic(own) else [own]), "y")
                self.roles[value] = "output"

    def _name_values(self) -> None:
        """The user's own variables, and what would otherwise be written out many times."""
        size: dict[fx.Node, int] = {}
        for node in self.ops:
            size[node] = 1 + sum(size[i] for i in node.all_input_nodes if i not in self.names and i in size)
            if node in self.names or node.meta["val"].dtype is torch.bool or not node.all_input_nodes:
                continue
            own = nice_name(node.meta.get("user_name") or "")
            shared = len(node.users) > 1
            if (shared and (size[node] > 2 or not is_generic(own))) or size[node] > 12:
                self.names[node] = self._unique.unique(*([] if is_generic(own) else [own, f"{own}_"]), "a")

    def equations(self) -> list[Equation]:
        named = [n for n in self.ops if n in self.names]
        lines = [Equation(self.roles.get(n, ""), self.names[n], _cut(self.infix.definition(n))) for n in named]
        return lines + [Equation("reset", name, self.names[value]) for name, value in self.aliases]


def _cut(text: str) -> str:
    return text if len(text) <= MAX_LINE else text[: MAX_LINE - 1] + "…"


# ---------------------------------------------------------------------------------------------------------- surrogate


def surrogate(recurrence: Recurrence) -> str | None:
    """The slope of the spike as an expression of its argument ``u``: the factor of the spike's cotangent in the
    backward graph. `None` where no gradient passes the spike."""
    fires = spike_of_state(recurrence)
    if not fires or recurrence.backward is None:
        return None
    for fire in fires:
        try:
            found = _Slope(recurrence, fire).expression()
        except Exception:
            return "(a form that explain cannot write down)"
        if found is not None:
            return _simplified(found) or found
    return None


def passes_gradient(recurrence: Recurrence) -> bool:
    """Whether a result that is made of comparisons alone, such as a spike of three values, has a gradient."""
    graph = recurrence.step.graph
    compared = {n for n in graph.nodes if op_name(n) in COMPARISONS}
    otherwise = reached(graph.find_nodes(op="placeholder"), stop=compared.__contains__)
    values = results(recurrence.step)[len(recurrence.carries) :]
    return any(y.differentiable and v not in otherwise for y, v in zip(recurrence.ys, values, strict=True))


_LINEAR = {"add", "sub", "rsub", "mul", "div", "neg", "where", "_to_copy"}


class _Slope:
    def __init__(self, recurrence: Recurrence, fire: Fire) -> None:
        assert recurrence.backward is not None
        self.recurrence, self.fire = recurrence, fire
        self.graph = recurrence.backward.graph
        self.nodes = list(self.graph.nodes)
        placeholders = [n for n in self.nodes if n.op == "placeholder"]
        n_operands = len(recurrence.carries) + len(recurrence.xs) + len(recurrence.consts)
        self.cotangents = placeholders[n_operands:]
        self.flow = reached(self.cotangents)  # what depends on a cotangent
        match = _match(recurrence.step, recurrence.backward)
        self.argument = self._shifted_argument(match)
        compared = match.get(fire.compared)
        self.slopes = reached([self.argument], stop=lambda n: n is compared) - self.flow if self.argument else set()

    def _shifted_argument(self, match: dict[fx.Node, fx.Node]) -> fx.Node | None:
        """``h - threshold``: the operand of ``>= 0``, or of ``h >= threshold`` a difference made for the backward."""
        node = match.get(self.fire.argument)
        if self.fire.compared.args[1] == 0 or op_name(self.fire.compared) == "heaviside" or node is None:
            return node
        threshold = self.fire.compared.args[1]
        threshold = match.get(threshold, threshold) if isinstance(threshold, fx.Node) else threshold
        return next((u for u in node.users if op_name(u) == "sub" and u.args[:2] == (node, threshold)), None)

    def expression(self) -> str | None:
        start = self._start()
        if start is None:
            return None
        factors: dict[fx.Node, str] = {start: ""}
        self.infix = Infix({self.argument: "u"} if self.argument else {})
        self._name_leaves()
        inside = reached([start]) & self._towards_charge()
        best = ""
        for node in (n for n in self.nodes if n in inside and n is not start):
            factor = self._factor(node, factors)
            if factor is None:
                continue
            factors[node] = factor
            if self._merges(node, factors):
                break
            if self._is_cut(node, inside, start):
                best = factor
                if any(u.op == "output" for u in node.users) or len(set(node.users) & inside) > 1:
                    break
        return best or None

    def _start(self) -> fx.Node | None:
        """The spike's cotangent: what is first multiplied by a function of the argument, before numbers scale it."""
        for node in self.nodes:
            if op_name(node) not in ("mul", "div", "where") or node not in self.flow:
                continue
            inputs = node.all_input_nodes
            if any(i in self.slopes for i in inputs):
                found = next(i for i in inputs if i in self.flow)
                return self._climb(found)
        return None

    def _climb(self, node: fx.Node) -> fx.Node:
        top = node
        while op_name(top) in ("mul", "div") and len(top.all_input_nodes) == 1 and len(top.users) == 1:
            top = top.all_input_nodes[0]
        if op_name(top) in ("add", "sub"):
            return top
        if top in self.cotangents:
            named: list[Any] = [*self.recurrence.differentiable_carries, *self.recurrence.differentiable_ys]
            value = self._result_of(named[self.cotangents.index(top)].name)
            if value is self.fire.spike or self.fire.spike in getattr(value, "all_input_nodes", ()):
                return top
        return node

    def _result_of(self, name: str) -> object:
        specs: list[Any] = [*self.recurrence.carries, *self.recurrence.ys]
        return next(r for s, r in zip(specs, results(self.recurrence.step), strict=True) if s.name == name)

    def _towards_charge(self) -> set[fx.Node]:
        """What leads to gradients of states and inputs (a learnable alpha's own gradient is another story)."""
        assert self.recurrence.backward is not None
        wanted = len(self.recurrence.differentiable_carries) + sum(x.needs_grad for x in self.recurrence.xs)
        found: set[fx.Node] = set()
        frontier = [r for r in results(self.recurrence.backward)[:wanted] if isinstance(r, fx.Node)]
        while frontier:
            node = frontier.pop()
            if node not in found:
                found.add(node)
                frontier += node.all_input_nodes
        return found

    def _name_leaves(self) -> None:
        operands = _specs(self.recurrence)
        for node, spec in zip((n for n in self.nodes if n.op == "placeholder"), operands, strict=False):
            self.infix.names.setdefault(node, nice_name(spec.name))

    def _merges(self, node: fx.Node, factors: dict[fx.Node, str]) -> bool:
        """A sum with a cotangent that came another way: the charge's own."""
        others = [i for i in node.all_input_nodes if i in self.flow and i not in factors]
        return op_name(node) in ("add", "sub") and bool(others)

    def _is_cut(self, node: fx.Node, inside: set[fx.Node], start: fx.Node) -> bool:
        """Every path from the spike's cotangent to a gradient runs through `node`."""
        seen, frontier = {start}, [start]
        while frontier:
            here = frontier.pop()
            for user in here.users:
                if user.op == "output":
                    return False
                if user in inside and user is not node and user not in seen:
                    seen.add(user)
                    frontier.append(user)
        return True

    def _factor(self, node: fx.Node, factors: dict[fx.Node, str]) -> str | None:
        """What the node's value is for a cotangent of 1; "" stands for 1."""
        name, args = op_name(node), list(node.args)
        if name not in _LINEAR:
            return None
        parts = [factors.get(a) if isinstance(a, fx.Node) else None for a in args]
        if name == "rsub":
            args, parts = args[1::-1], parts[1::-1]
        if name == "neg":
            return f"-({parts[0] or 1})"
        if name == "_to_copy":
            return parts[0]
        if name == "where":
            pairs = zip(parts, args, strict=True)
            condition, yes, no = [self.infix.text(a) if p is None else p or "1" for p, a in pairs]
            return f"where({condition}, {yes}, {no})"
        left, right = parts[0], parts[1]
        if name in ("add", "sub"):
            terms = [f"({p or 1})" for p in (left, right) if p is not None]
            sign = " - " if name == "sub" else " + "
            return ("-" if left is None and name == "sub" else "") + sign.join(terms)
        if left is None:
            left, args = right, [args[1], args[0]]
        operand = self.infix.text(args[1], _PRODUCT + (name == "div"))
        sign = "*" if name == "mul" else "/"
        if operand.startswith("-"):
            operand = f"({operand})"
        if not left:
            return operand if sign == "*" else f"1/{operand}"
        return f"{left if _is_product(left) else f'({left})'}{sign}{operand}"


def _is_product(text: str) -> bool:
    """No ``+`` or ``-`` outside of brackets."""
    depth = 0
    for i, c in enumerate(text):
        depth += (c in "([") - (c in ")]")
        if c in "+-" and depth == 0 and text[i - 1 : i] not in ("e", "*", "/"):
            return False
    return True


def _match(step: fx.GraphModule, backward: fx.GraphModule) -> dict[fx.Node, fx.Node]:
    """Nodes of the step -> the same values in the backward graph, which recomputes them."""
    second = {key: node for node, key in _expression_keys(backward).items()}
    return {node: second[key] for node, key in _expression_keys(step).items() if key in second}


def _expression_keys(gm: fx.GraphModule) -> dict[fx.Node, int]:
    """A hash of the whole expression under each node."""
    keys: dict[fx.Node, int] = {}
    for i, node in enumerate(gm.graph.nodes):
        args = fx.node.map_arg((node.args, tuple(sorted(node.kwargs.items()))), lambda n: f"%{keys[n]}")
        keys[node] = hash((i if node.op == "placeholder" else str(node.target), repr(args)))
    return keys


# ---------------------------------------------------------------------------------------------------- sympy


def is_affine(recurrence: Recurrence) -> bool | None:
    """Whether the (first) charge is affine in all states together; None where it cannot be said."""
    fires = spike_of_state(recurrence)
    if not fires:
        return None
    states = [n for n in recurrence.step.graph.nodes if n.op == "placeholder"][: len(recurrence.carries)]

    def decide() -> bool:
        import sympy

        symbols = {s: sympy.Symbol(f"state{i}", real=True) for i, s in enumerate(states)}
        expression = to_sympy(fires[0].charge, symbols, {})
        own = [symbols[s] for s in states]
        return all(sympy.simplify(sympy.diff(expression, a, b)) == 0 for a in own for b in own)

    return capped(decide)  # type: ignore[return-value]


def to_sympy(value: object, symbols: dict[fx.Node, object], memo: dict[fx.Node, object]):  # type: ignore[no-untyped-def]
    """The exact symbolic form of a node; ops sympy need not know are functions of their operands."""
    import sympy

    if isinstance(value, bool) or not isinstance(value, (int, float, fx.Node)):
        return sympy.Symbol(re.sub(r"\W", "_", str(value)))
    if not isinstance(value, fx.Node):
        return sympy.Integer(int(value)) if float(value).is_integer() else sympy.Float(value)
    if value not in memo:
        if value in symbols or value.op == "placeholder":
            memo[value] = symbols.get(value) or sympy.Symbol(value.name, real=True)
        elif len(memo) > MAX_SYMBOLIC_NODES:
            raise ValueError("too large")
        else:
            memo[value] = _op_to_sympy(value, [to_sympy(a, symbols, memo) for a in value.args if a is not None])
    return memo[value]


def _op_to_sympy(node: fx.Node, a: list):  # type: ignore[no-untyped-def, type-arg]
    import sympy

    name = op_name(node)
    alpha = node.kwargs.get("alpha", 1)
    simple = {
        "add": lambda: a[0] + alpha * a[1],
        "sub": lambda: a[0] - alpha * a[1],
        "rsub": lambda: a[1] - alpha * a[0],
        "mul": lambda: a[0] * a[1],
        "addcmul": lambda: a[0] + node.kwargs.get("value", 1) * a[1] * a[2],
        "div": lambda: a[0] / a[1],
        "neg": lambda: -a[0],
        "pow": lambda: a[0] ** a[1],
        "reciprocal": lambda: 1 / a[0],
        "exp": lambda: sympy.exp(a[0]),
        "sigmoid": lambda: 1 / (1 + sympy.exp(-a[0])),
        "_to_copy": lambda: a[0],
    }
    if name in simple and not node.kwargs.get("rounding_mode"):
        return simple[name]()
    return sympy.Function(name)(*a)


def _simplified(text: str) -> str | None:
    """sympy's tidier form of a slope, where it is shorter; None where sympy cannot read the text or takes too long."""
    if re.search(r"[\[\]<>=]|where|H\(|\band\b|\bor\b", text) or len(text) > 400:
        return None

    def tidy() -> str:
        import sympy
        from sympy.parsing.sympy_parser import parse_expr

        names = set(re.findall(r"[A-Za-z_]\w*", text))
        called = set(re.findall(r"([A-Za-z_]\w*)\(", text))
        local = {n: sympy.Function(n) if n in called else sympy.Symbol(n, real=True) for n in names}
        value = sympy.nsimplify(parse_expr(text, local_dict=local, global_dict=_SYMPY_NAMES), rational=False)
        return re.sub(r"(\d)\.0\b", r"\1", str(value))

    found = capped(tidy)
    return found if isinstance(found, str) and len(found) <= len(text) else None


_SYMPY_NAMES: dict[str, object] = {}


def capped(function: Callable[[], object]) -> object:
    """The function's value; None where it raises or takes too long."""
    found: list[object] = []

    def run() -> None:
        try:
            found.append(function())
        except Exception:
            found.clear()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(MAX_SECONDS)
    return found[0] if found else None

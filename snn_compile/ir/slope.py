"""The slope of a spike, read off the backward graph of a step."""

from __future__ import annotations

from typing import Any

from torch import fx

from snn_compile.ir.equations import operand_names
from snn_compile.ir.fire import Fire, op_name, reached, results, spike_of_state
from snn_compile.ir.infix import PRODUCT, Infix
from snn_compile.ir.recurrence import Recurrence


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
            return found
    return None


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
        placeholders = (n for n in self.nodes if n.op == "placeholder")
        for node, name in zip(placeholders, operand_names(self.recurrence), strict=False):
            self.infix.names.setdefault(node, name)

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
        operand = self.infix.text(args[1], PRODUCT + (name == "div"))
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

"""The signatures and graphs of several recurrences, side by side in one: what `fuse_recurrences` makes.

    step_a(v, x) -> v', s        backward_a(v, x, grad_v', grad_s) -> grad_v, grad_x
    step_b(r, x) -> r', y        backward_b(r, x, grad_r', grad_y) -> grad_r, grad_x

    ->  step(v, r, x) -> v', r', s, y
        backward(v, r, x, grad_v', grad_r', grad_s, grad_y) -> grad_v, grad_r, grad_x of a + grad_x of b

An operand that members share is one operand. Where one of them reads it detached, its gradient is the others'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from snn_compile.ir.recurrence import Recurrence
from snn_compile.passes.views import VIEWS

CALLS = ("call_function", "call_method")


@dataclass
class Traced:
    """The call of a loop in the outer graph, and the recurrence that the loop is."""

    call: fx.Node
    recurrence: Recurrence
    steps: int | torch.SymInt


def operand_key(spec: object, operand: object) -> tuple[object, ...]:
    """Equal for operands that hold the same numbers and are read in the same order."""
    return (type(spec), getattr(spec, "reverse", False), value_key(operand))


def value_key(operand: object) -> object:
    """Equal for views that are made in the same way from the same node."""
    if not isinstance(operand, fx.Node) or operand.op not in CALLS or operand.target not in VIEWS:
        return operand
    if operand.target in ("detach", torch.detach):
        return value_key(operand.args[0])
    return f"{operand.target} {fx.node.map_arg((operand.args, operand.kwargs), value_key)}"  # type: ignore[arg-type]


#: What a placeholder of a member's graph stands for; of equal keys, one placeholder of the new graph.
Key = tuple[object, ...]


@dataclass
class _United:
    """The operands of one kind, each once."""

    specs: list[Any]
    operands: list[Any]
    #: for each member, where its operands are among them
    places: list[list[int]]


def _unite(parts: Sequence[tuple[Sequence[Any], Sequence[Any]]]) -> _United:
    """`parts`: the specs and the operands of each member."""
    united = _United([], [], [])
    place_of: dict[object, int] = {}
    for specs, operands in parts:
        united.places.append([])
        for spec, operand in zip(specs, operands, strict=True):
            place = place_of.setdefault(operand_key(spec, operand), len(united.specs))
            united.places[-1].append(place)
            if place == len(united.specs):
                united.specs.append(spec)
                united.operands.append(operand)
            elif spec.needs_grad:  # others may read it detached: theirs is no part of its gradient
                united.specs[place], united.operands[place] = replace(united.specs[place], needs_grad=True), operand
    return united


class Fusion:
    """The members' signatures and graphs side by side."""

    def __init__(self, members: Sequence[Traced]) -> None:
        self.members = [t.recurrence for t in members]
        inits, xs, consts = zip(*(t.recurrence.split(t.call.args) for t in members), strict=True)
        self.inits = [i for given in inits for i in given]
        self.xs = _unite([(r.xs, given) for r, given in zip(self.members, xs, strict=True)])
        self.consts = _unite([(r.consts, given) for r, given in zip(self.members, consts, strict=True)])

    @property
    def operands(self) -> list[Any]:
        return [*self.inits, *self.xs.operands, *self.consts.operands]

    def recurrence(self) -> Recurrence:
        first, *_ = members = self.members
        carries, ys = tuple(c for r in members for c in r.carries), tuple(y for r in members for y in r.ys)
        fused = Recurrence(first.name, carries, tuple(self.xs.specs), tuple(self.consts.specs), ys, self._step())
        if any(r.backward is not None for r in members):
            fused.backward = self._backward()
        fused.location = first.location
        fused.meta["target"] = first.meta.get("target")
        fused.meta["fused"] = [part for r in members for part in r.meta.get("fused", [(r.name, r.location)])]
        folded = sum(r.meta.get("thresholds_folded", 0) for r in members)
        fused.meta |= {"thresholds_folded": folded} if folded else {}
        return fused

    # ------------------------------------------------------------------------------------------------------- its graphs

    def _operand_keys(self, member: int) -> list[Key]:
        """What the placeholders of the member's step stand for."""
        states: list[Key] = [("state", member, i) for i in range(len(self.members[member].carries))]
        return states + [("x", i) for i in self.xs.places[member]] + [("const", i) for i in self.consts.places[member]]

    def _all_operand_keys(self) -> list[Key]:
        states = [("state", m, i) for m, r in enumerate(self.members) for i in range(len(r.carries))]
        return [*states, *(("x", i) for i in range(len(self.xs.specs))), *(("const", i) for i in range(len(self.consts.specs)))]

    def _step(self) -> fx.GraphModule:
        graph = _SideBySide()
        for member, r in enumerate(self.members):
            graph.describe(r.step, self._operand_keys(member))
        graph.add_placeholders(self._all_operand_keys())
        results = [graph.copy(r.step, self._operand_keys(member)) for member, r in enumerate(self.members)]
        next_states = [v for r, values in zip(self.members, results, strict=True) for v in values[: len(r.carries)]]
        ys = [v for r, values in zip(self.members, results, strict=True) for v in values[len(r.carries) :]]
        return graph.finish([*next_states, *ys])

    def _cotangent_keys(self, member: int) -> tuple[list[Key], list[Key]]:
        """Of the next states, and of the outputs, those that are differentiable."""
        r = self.members[member]
        states: list[Key] = [("grad_state", member, i) for i in range(len(r.differentiable_carries))]
        return states, [("grad_y", member, i) for i in range(len(r.differentiable_ys))]

    def _backward(self) -> fx.GraphModule:
        graph = _SideBySide()
        keys = {}
        cotangents = [self._cotangent_keys(member) for member in range(len(self.members))]
        for member, r in enumerate(self.members):
            graph.describe(r.step, self._operand_keys(member))
            if r.backward is not None:
                keys[member] = [*self._operand_keys(member), *cotangents[member][0], *cotangents[member][1]]
                graph.describe(r.backward, keys[member])
        graph.add_placeholders(
            [*self._all_operand_keys(), *(k for c, _ in cotangents for k in c), *(k for _, y in cotangents for k in y)]
        )
        results = {member: graph.copy(self.members[member].backward, keys[member]) for member in keys}
        return graph.finish(self._gradients(graph, results))

    def _gradients(self, graph: _SideBySide, results: dict[int, list[Any]]) -> list[Any]:
        """Those of states one after the other; of an operand, the sum over its readers."""
        states: list[Any] = []
        sums: dict[Key, Any] = {}
        for member, values in results.items():
            r = self.members[member]
            n = len(r.differentiable_carries)
            states += values[:n]
            keys = self._operand_keys(member)[len(r.carries) :]
            wanted = [key for key, spec in zip(keys, (*r.xs, *r.consts), strict=True) if spec.needs_grad]
            for key, value in zip(wanted, values[n:], strict=True):
                sums[key] = graph.add(sums.get(key), value)
        united = (("x", self.xs), ("const", self.consts))
        return states + [sums[kind, i] for kind, u in united for i, spec in enumerate(u.specs) if spec.needs_grad]


class _SideBySide:
    """A graph made of others, with common placeholders."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.described: dict[Key, fx.Node] = {}
        self.placeholders: dict[Key, fx.Node] = {}

    def describe(self, gm: fx.GraphModule, keys: Sequence[Key]) -> None:
        """Placeholders of these keys are like those of `gm`."""
        for node, key in zip(gm.graph.find_nodes(op="placeholder"), keys, strict=True):
            self.described.setdefault(key, node)

    def add_placeholders(self, keys: Sequence[Key]) -> None:
        for key in keys:
            node = self.described[key]
            new = self.placeholders[key] = self.graph.placeholder(node.name)
            new.target, new.meta = new.name, dict(node.meta)

    def copy(self, gm: fx.GraphModule, keys: Sequence[Key]) -> list[Any]:
        """The graph's results, in the new one."""
        placeholders = gm.graph.find_nodes(op="placeholder")
        nodes = {node: self.placeholders[key] for node, key in zip(placeholders, keys, strict=True)}
        return list(self.graph.graph_copy(gm.graph, nodes))  # type: ignore[arg-type]

    def add(self, a: Any, b: Any) -> Any:
        """``a + b``, where None is zero."""
        if a is None or b is None:
            return b if a is None else a
        node = self.graph.call_function(torch.ops.aten.add.Tensor, (a, b))
        node.meta = {"val": max((a.meta["val"], b.meta["val"]), key=torch.Tensor.dim), "is_rounded": False}
        return node

    def finish(self, results: Sequence[Any]) -> fx.GraphModule:
        self.graph.output(tuple(results))
        return fx.GraphModule(torch.nn.Module(), self.graph)

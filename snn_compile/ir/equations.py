"""The step of a recurrence as equations in the user's names, for reports and for the comments of generated kernels.

    h = v + (x - v)/2        charge: what is compared with the threshold
    s = H(h - 1)             fire:   the spike; H(u) is 1 where u >= 0, else 0
    v' = h*(1 - s)           reset:  the next state

This is text, never arithmetic: kernels are generated from the graph itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from snn_compile.ir.fire import is_constant, op_name, results, spike_of_state
from snn_compile.ir.infix import Infix
from snn_compile.ir.names import Names, is_generic, nice_name
from snn_compile.ir.recurrence import Carry, Const, Recurrence, Signature, TimeSeries

#: Longer than this, a line is cut.
MAX_LINE = 150


@dataclass(frozen=True)
class Equation:
    role: str  # "charge", "fire", "reset", "output" or "" for what lies between
    name: str
    text: str

    def __str__(self) -> str:
        return f"{self.name} = {self.text}"


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


def operand_names(recurrence: Signature) -> list[str]:
    """What equations call the states, inputs and parameters, in the order of the operands: ``v, u, u -> v, u, u2``."""
    names = Names()

    def name(operand: Carry | TimeSeries | Const) -> str:
        own = nice_name(operand.name)
        return names.unique("state" if isinstance(operand, Carry) and is_generic(own) else own)

    return [name(operand) for operand in recurrence.operands]


def writer(recurrence: Recurrence) -> Infix:
    """Writes the values of the step in the names that `equations` gives them."""
    return _Writer(recurrence).infix


class _Writer:
    """Decides which values get a line, and their names."""

    def __init__(self, recurrence: Recurrence) -> None:
        self.recurrence = recurrence
        nodes = list(recurrence.step.graph.nodes)
        self.placeholders = [n for n in nodes if n.op == "placeholder"]
        self.names: dict[fx.Node, str] = dict(zip(self.placeholders, operand_names(recurrence), strict=True))
        self.roles: dict[fx.Node, str] = {}
        self.aliases: list[tuple[str, fx.Node]] = []
        self._unique = Names(self.names.values())
        self.ops = [n for n in nodes if n.op == "call_function"]
        self.fires = spike_of_state(recurrence)
        self._name_states()
        self._name_fires()
        self._name_outputs()
        self._name_values()
        self.infix = Infix(self.names)

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
            if node in self.names or node.meta["val"].dtype is torch.bool or is_constant(node):
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

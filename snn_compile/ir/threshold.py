"""A neuron that fires on an affine function of a potential, ``a*u + b >= c``, fires on the potential itself:

    u >= (c - b)/a   where a > 0,      u <= (c - b)/a   where a < 0,      b >= c, whatever u   where a == 0

with a, b, c constant over time: a batch norm with fixed statistics, whoever wrote it, is one. Here it is found; what becomes
of it is for `passes/fold_threshold` and for reports.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from torch import fx

from snn_compile.ir.equations import writer
from snn_compile.ir.fire import Fire, op_name, reached, spike_of_state
from snn_compile.ir.recurrence import Recurrence
from snn_compile.ir.symbolic import capped, to_sympy


@dataclass(frozen=True)
class AffineFire:
    """``fire.compared`` compares a value that the ops of `chain` make from `potential`, in order."""

    fire: Fire
    potential: fx.Node
    chain: tuple[fx.Node, ...]

    def other_uses(self) -> list[fx.Node]:
        """What reads a value of the chain besides the comparison: it needs the value, not only its sign."""
        inside = {*self.chain, self.fire.compared}
        return [u for n in self.chain for u in n.users if u not in inside]


def affine_fires(recurrence: Recurrence) -> list[AffineFire]:
    """The fires of a step that scale a potential by something other than a number, and shift it."""
    placeholders = [n for n in recurrence.step.graph.nodes if n.op == "placeholder"]
    varying = reached(placeholders[: len(recurrence.carries) + len(recurrence.xs)])
    found = []
    for fire in spike_of_state(recurrence):
        if op_name(fire.compared) == "heaviside" or fire.compared.args[1] in varying:
            continue
        chain = []
        node = fire.argument
        while (source := _potential_of(node, varying)) is not None:
            chain.append(node)
            node = source
        if any(_scales(n) for n in chain):
            found.append(AffineFire(fire, node, tuple(reversed(chain))))
    return found


def _potential_of(node: fx.Node, varying: set[fx.Node]) -> fx.Node | None:
    """The operand that an affine op with constants otherwise is applied to."""
    name, args = op_name(node), node.args
    inner = [i for i, a in enumerate(args) if isinstance(a, fx.Node) and a in varying]
    if len(inner) != 1 or node.kwargs:
        return None
    allowed = {"add": (0, 1), "sub": (0, 1), "rsub": (0, 1), "mul": (0, 1), "div": (0,), "neg": (0,), "addcmul": (1, 2)}
    return args[inner[0]] if inner[0] in allowed.get(name, ()) and len(args) <= 3 else None  # type: ignore[return-value]


def _scales(node: fx.Node) -> bool:
    return op_name(node) in ("mul", "div", "addcmul") and len(node.all_input_nodes) > 1


def describe_thresholds(recurrence: Recurrence) -> list[str]:
    """``0.5*v + x >= (1 - shift)/scale where scale > 0``: the folded threshold of each affine fire, solved by sympy."""
    solved = [capped(functools.partial(_solve, recurrence, found)) for found in affine_fires(recurrence)]
    return [text for text in solved if isinstance(text, str)]


_RELATIONS = {"ge": (">=", "<="), "gt": (">", "<"), "le": ("<=", ">="), "lt": ("<", ">")}


def _solve(recurrence: Recurrence, found: AffineFire) -> str:
    import sympy

    names = writer(recurrence)
    symbols: dict[fx.Node, Any] = {
        n: sympy.Symbol(names.atom(n), real=True)
        for n in {a for n in (*found.chain, found.fire.compared) for a in n.all_input_nodes} - {*found.chain}
    }
    threshold = limit = to_sympy(found.fire.compared.args[1], symbols, {})
    potential = symbols[found.potential]
    for node, inner in zip(reversed(found.chain), (*reversed(found.chain[:-1]), found.potential), strict=True):
        step = to_sympy(node, {**symbols, inner: potential}, {})  # (affine: quicker inverted than solved)
        threshold = (threshold - step.subs(potential, 0)) / sympy.diff(step, potential)
    value = to_sympy(found.chain[-1], symbols, {})
    slope = sympy.simplify(sympy.diff(value, potential))
    if sympy.simplify(value.subs(potential, threshold) - limit) != 0:
        raise ValueError("the folded threshold is not where the comparison turns")
    relation, mirrored = _RELATIONS[op_name(found.fire.compared)]
    return f"{names.text(found.potential)} {relation} {threshold} where {slope} > 0, {mirrored} where {slope} < 0"

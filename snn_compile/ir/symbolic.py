"""What sympy says of a step. It is imported when it is asked, and given up on after a time cap."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable

from torch import fx

from snn_compile.ir.fire import op_name, spike_of_state
from snn_compile.ir.recurrence import Recurrence

#: sympy is not asked about larger expressions, nor waited for longer (a report is the same on a busy machine).
MAX_SYMBOLIC_NODES, MAX_SECONDS = 200, 20.0


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

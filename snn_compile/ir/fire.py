"""Where a step fires: comparisons with a threshold whose result is used as a number."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from snn_compile.ir.recurrence import Recurrence

COMPARISONS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "eq": "==", "ne": "!="}
#: Makers of a constant: the number, or which operand it is.
CONSTANTS: dict[str, int | tuple[int]] = {
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros"), 0),
    **dict.fromkeys(("ones", "ones_like", "new_ones"), 1),
    "scalar_tensor": (0,),
    "full": (1,),
    "full_like": (1,),
    "new_full": (2,),
}


@dataclass(frozen=True)
class Fire:
    """A spike of the step: ``spike = H(argument)``, from the `charge` that is compared with the threshold."""

    spike: fx.Node
    compared: fx.Node
    argument: fx.Node
    charge: fx.Node


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


def is_constant(node: fx.Node) -> bool:
    """One number in all lanes."""
    return op_name(node) in CONSTANTS


def _chooses_numbers(node: fx.Node) -> bool:
    """``where(condition, 1, 0)``"""
    return op_name(node) == "where" and all(
        not isinstance(a, fx.Node) or is_constant(a) or not a.all_input_nodes for a in node.args[1:]
    )


def _fire(spike: fx.Node, compared: fx.Node, left: Any, right: object) -> Fire:
    charge = left
    if right == 0 and op_name(left) == "sub" and isinstance(left.args[0], fx.Node):
        charge = left.args[0]
    elif right == 0 and op_name(left) in ("div", "mul") and op_name(left.args[0]) == "sub":
        charge = left.args[0].args[0]  # (h - threshold)/threshold  # type: ignore[union-attr, assignment]
    return Fire(spike, compared, left, charge if isinstance(charge, fx.Node) else left)


def reached(nodes: Iterable[fx.Node], stop: Callable[[fx.Node], bool] = lambda n: False) -> set[fx.Node]:
    """All nodes that depend on the values of `nodes`, which are included."""
    found, frontier = set(nodes), list(nodes)
    while frontier:
        for user in frontier.pop().users:
            if user not in found and not is_constant(user) and not stop(user):
                found.add(user)
                frontier.append(user)
    return found


def spike_of_state(recurrence: Recurrence) -> list[Fire]:
    """The fires whose argument depends on a state or an input, not only on constants."""
    placeholders = [n for n in recurrence.step.graph.nodes if n.op == "placeholder"]
    varying = reached(placeholders[: len(recurrence.carries) + len(recurrence.xs)])
    return [f for f in find_fires(recurrence.step) if f.argument in varying]


def passes_gradient(recurrence: Recurrence) -> bool:
    """Whether a result that is made of comparisons alone, such as a spike of three values, has a gradient."""
    graph = recurrence.step.graph
    compared = {n for n in graph.nodes if op_name(n) in COMPARISONS}
    otherwise = reached(graph.find_nodes(op="placeholder"), stop=compared.__contains__)
    values = results(recurrence.step)[len(recurrence.carries) :]
    return any(y.differentiable and v not in otherwise for y, v in zip(recurrence.ys, values, strict=True))

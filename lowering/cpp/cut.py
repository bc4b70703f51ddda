"""Which values of a step the replay records for the step's backward: a minimum cut.

    h = v + (x - v)/2                      records v and reads x again: three accesses
    grad_v = …h…; grad_x = …h…       ->    records h: two accesses, and h is not computed again

The backward graph recomputes what it needs of the step from the states and the inputs. Cutting it where the fewest
bytes go through leaves the least traffic to the scratch memory. Only values that the step computes can be recorded.
"""

from __future__ import annotations

from collections.abc import Sequence

import networkx as nx
from torch import fx

from snn_compile.ir.recurrence import Recurrence
from snn_compile.lowering.cpp.emit import levels, needed, results
from snn_compile.lowering.cpp.literals import held_bytes
from snn_compile.lowering.cpp.numbering import Numbering

#: Levels: does not change over time, a value of the step, depends on a cotangent.
_CONSTANT, _STEP, _COTANGENT = range(3)


def values_to_record(
    recurrence: Recurrence, step_names: Sequence[str], backward_names: Sequence[str], numbering: Numbering
) -> list[tuple[fx.Node, fx.Node]]:
    """Pairs of a node of the step graph and the equal node of the backward graph."""
    assert recurrence.backward is not None
    step, backward = recurrence.step.graph, recurrence.backward.graph
    in_step = _by_number(step, step_names, numbering)
    names = dict(zip(_placeholders(backward), backward_names, strict=True))
    nodes = needed(backward, results(backward))
    level = levels(nodes, _placeholder_levels(recurrence, backward))
    xs = _placeholders(backward)[len(recurrence.carries) :][: len(recurrence.xs)]

    flow = nx.DiGraph()
    flow.add_nodes_from(("source", "sink"))
    returned = set(results(backward))
    for node in nodes:
        if level[node] != _STEP:
            continue
        recordable = node.op == "placeholder" or numbering.number(node, names) in in_step
        accesses = 1 if node in xs else 2  # an input need not be written
        cost = accesses * held_bytes(node.meta["val"].dtype) if recordable else None
        _edge(flow, (node, "in"), (node, "out"), cost)
        if node.op == "placeholder":
            _edge(flow, "source", (node, "in"), None)
        for read in node.all_input_nodes:
            if level[read] == _STEP:
                _edge(flow, (read, "out"), (node, "in"), None)
        if node in returned or any(level.get(user) == _COTANGENT for user in node.users):
            _edge(flow, (node, "out"), "sink", None)
    reachable, _ = nx.minimum_cut(flow, "source", "sink")[1]
    cut = [n for n in nodes if (n, "in") in reachable and (n, "out") not in reachable and n not in xs]
    return [(in_step[numbering.number(n, names)], n) for n in cut]


def _edge(flow: nx.DiGraph, tail: object, head: object, capacity: int | None) -> None:
    """None: cannot be cut."""
    flow.add_edge(tail, head, **({} if capacity is None else {"capacity": capacity}))


def _placeholders(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op == "placeholder"]


def _placeholder_levels(recurrence: Recurrence, backward: fx.Graph) -> dict[fx.Node, int]:
    timed, constant = len(recurrence.carries) + len(recurrence.xs), len(recurrence.consts)
    return {
        n: _STEP if i < timed else _CONSTANT if i < timed + constant else _COTANGENT
        for i, n in enumerate(_placeholders(backward))
    }


def _by_number(graph: fx.Graph, names: Sequence[str], numbering: Numbering) -> dict[int, fx.Node]:
    named = dict(zip(_placeholders(graph), names, strict=True))
    return {numbering.number(n, named): n for n in reversed(graph.nodes) if n.op in ("placeholder", "call_function")}

"""What of a graph a kernel needs: which nodes, which of them do not change over time, which states."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import fx

from snn_compile.lowering.ops import CONSTANTS, TABLE, operand_nodes, overload_name


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


def count_users(nodes: Sequence[fx.Node], results: Iterable[fx.Node]) -> dict[fx.Node, int]:
    """How often the text of each node would appear, were it written where it is used."""
    count = dict.fromkeys(nodes, 0)
    for node in nodes:
        if not inputs(node):
            continue
        given = operand_nodes(node)
        template = template_of(node, given)
        for i, operand in enumerate(given):
            if isinstance(operand, fx.Node) and operand in count:
                count[operand] += template.count(f"{{{i}}}")
    for result in results:
        if result in count:
            count[result] += 1
    return count


def template_of(node: fx.Node, given: Sequence[object]) -> str:
    """The op's expression, with ``{i}`` for its operands."""
    expression = TABLE[overload_name(node.target)].triton
    return expression if isinstance(expression, str) else expression([f"{{{i}}}" for i in range(len(given))], node)


def closure(start: set[int], read: Callable[[set[int]], set[int]]) -> list[int]:
    """All states that `start` depends on over any number of steps."""
    live = set(start)
    while True:
        more = live | read(live)
        if more == live:
            return sorted(live)
        live = more


def states_read(graph: fx.Graph, results: Sequence[fx.Node | None], n: int) -> set[int]:
    nodes = needed(graph, results)
    placeholders = [p for p in graph.nodes if p.op == "placeholder"]
    return {i for i in range(n) if placeholders[i] in nodes}


def pick(results: Sequence[fx.Node | None], which: Iterable[int]) -> list[fx.Node | None]:
    return [results[i] for i in which]

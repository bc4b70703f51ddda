"""A region, such as that of `torch.utils.checkpoint`, that is handed the steps of a series reads them itself.

    region(body, x[0], x[1], …)   with body(x0, x1, …)   ->   region(body, x)   with x0, x1, … = x[0], x[1], … in the body

Dynamo takes `for step in x` of a tensor from outside out of the region; inside it, `reroll` finds the loop. Does not fire: a
single step, a body with several callers.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import fx

from snn_compile.ir.values import example, is_getitem
from snn_compile.passes.emit import emit

#: Higher-order ops that run their body, the first argument, on all others.
REGIONS = ("tag_activation_checkpoint", "wrap", "wrap_activation_checkpoint")


def is_region(node: fx.Node, names: Sequence[str] = REGIONS) -> bool:
    return isinstance(node.target, torch._ops.HigherOrderOperator) and node.target.name() in names


def read_steps_in_regions(gm: fx.GraphModule) -> None:
    """Rewrite `gm` (torch-level, with examples) and the bodies of its regions in place."""
    for node in list(gm.graph.nodes):
        if not is_region(node) or len(node.args[0].users) != 1:
            continue
        for source in dict.fromkeys(o.args[0] for o in node.args[1:] if _is_step(o)):
            _read_inside(getattr(gm, node.args[0].target), node, source)
    for node in reversed(gm.graph.nodes):
        if _is_step(node) and not node.users:
            gm.graph.erase_node(node)


def _is_step(node: object) -> bool:
    return is_getitem(node) and isinstance(node.args[1], int) and isinstance(example(node.args[0]), torch.Tensor)  # type: ignore[union-attr]


def _read_inside(body: fx.GraphModule, call: fx.Node, source: fx.Node) -> None:
    given = dict(zip(body.graph.find_nodes(op="placeholder"), call.args[1:], strict=True))
    steps = {p: o for p, o in given.items() if _is_step(o) and o.args[0] is source}
    if len(steps) < 2:
        return
    series = next((p for p, o in given.items() if o is source), None)
    last = next(reversed(given))
    if series is None:
        with body.graph.inserting_after(last):
            series = last = body.graph.placeholder(source.name)
        series.meta["example_value"] = example(source)
        given[series] = source
    with body.graph.inserting_after(last):
        for placeholder, step in reversed(steps.items()):
            inside = emit(body.graph, "call_function", operator.getitem, (series, step.args[1]), {})
            inside.meta = {**step.meta, **inside.meta}
            placeholder.replace_all_uses_with(inside)
            body.graph.erase_node(placeholder)
    call.args = (call.args[0], *(o for p, o in given.items() if p not in steps))
    body.recompile()

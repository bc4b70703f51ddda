"""A surrogate whose gradient nobody asks for becomes what its forward computes.

    r = autograd_function_apply(forward, backward, u)[0].detach()   ->   r = forward(u)[0].detach()

Dynamo keeps an `autograd.Function` whole only where its input wants a gradient. A neuron that resets by the detached spike of
its own state (``reset = spike(v - 1).detach()``) has therefore another first step than all others, in which the state is still
a constant; without this pass that step stays outside of the loop and one more state is carried through it.

Does not fire: where a value of the function reaches a result of the graph, a write or a region on a way without a `detach`.
"""

from __future__ import annotations

import torch
from torch import fx

from snn_compile.ir.values import is_getitem
from snn_compile.passes.classify import AUTOGRAD_FUNCTION
from snn_compile.passes.effects import is_grad_switch, is_write
from snn_compile.passes.emit import replace_by_results
from snn_compile.passes.inline import Inliner


def inline_detached(gm: fx.GraphModule) -> int:
    """Rewrite `gm` in place; gives how many functions were inlined."""
    passes_on: dict[fx.Node, bool] = {}
    for node in reversed(gm.graph.nodes):
        passes_on[node] = _passes_on(node, passes_on)
    calls = [n for n in gm.graph.nodes if n.target is AUTOGRAD_FUNCTION]
    found = [n for n in calls if all(is_getitem(u) and not passes_on[u] for u in n.users)]
    for node in found:
        _inline(gm, node)
    return len(found)


def _passes_on(node: fx.Node, of_users: dict[fx.Node, bool]) -> bool:
    """Whether a gradient may come to the operands of `node`: from a user of its results, or through what is not understood."""
    if node.target in ("detach", torch.detach):
        return False
    is_region = isinstance(node.target, torch._ops.HigherOrderOperator) and node.target is not AUTOGRAD_FUNCTION
    if node.op not in ("call_function", "call_method") or is_write(node) or is_region:
        return True
    return any(of_users[u] for u in node.users)


def _inline(gm: fx.GraphModule, node: fx.Node) -> None:
    forward = getattr(gm, node.args[0].target)  # type: ignore[union-attr]
    with gm.graph.inserting_before(node), torch.no_grad():
        results, _ = _WithoutSwitches(forward, gm, node).inline(node.args[2:])
    replace_by_results(node, results)


class _WithoutSwitches(Inliner):
    """Dynamo puts the body of `forward` under `no_grad`; without a gradient to come, there is nothing to switch off."""

    def run_node(self, n: fx.Node) -> object:
        return None if is_grad_switch(n) else super().run_node(n)

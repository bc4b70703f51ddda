"""Equal views of one tensor are one.

    for t: v = 0.9*v + x.transpose(0, 1)[t]        ->      y = x.transpose(0, 1); for t: v = 0.9*v + y[t]
    for t: v = v + noise[episode][t]               ->      n = noise[episode]; for t: v = v + n[t]

A view of the whole series that is made anew in every step is no series to `reroll`: each step would read another tensor.

Does not fire: reads of several steps (`x[t]`), tensors that are written into, `no_grad` regions.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from snn_compile.ir.values import example, is_getitem, storage_key
from snn_compile.passes.effects import is_grad_switch, written
from snn_compile.passes.views import REARRANGING

#: `flip` is a copy, which nobody writes into either.
_MERGED = REARRANGING | {"flip", torch.flip}


def merge_views(graph: fx.Graph) -> int:
    """Rewrite `graph` (torch-level, with examples) in place; gives how many views are gone."""
    if any(is_grad_switch(n) for n in graph.nodes):
        return 0
    touched = {storage_key(operand) for n in graph.nodes for operand in written(n)}
    first: dict[object, fx.Node] = {}
    count = 0
    for node in list(graph.nodes):
        if not (is_view(node) or _is_fixed_part(node)) or touched & {storage_key(node), storage_key(node.args[0])}:
            continue
        same = first.setdefault((str(node.target), repr(node.args), repr(sorted(node.kwargs.items()))), node)
        if same is not node:
            node.replace_all_uses_with(same)
            graph.erase_node(node)
            count += 1
    return count


def is_view(node: fx.Node) -> bool:
    """Whether the node rearranges the elements of its first operand."""
    is_call = node.op in ("call_function", "call_method") and bool(node.args)
    return is_call and node.target in _MERGED and isinstance(example(node), Tensor) and isinstance(node.args[0], fx.Node)


def _is_fixed_part(node: fx.Node) -> bool:
    """``x[2]`` of a tensor of which no other part is read, itself only read by index."""
    if not is_getitem(node) or not isinstance(example(node), Tensor) or not all(map(is_getitem, node.users)):
        return False
    source, index = node.args
    reads = [u.args[1] for u in source.users if is_getitem(u)]  # type: ignore[union-attr]
    return isinstance(index, int) and all(isinstance(i, int) and i == index for i in reads)

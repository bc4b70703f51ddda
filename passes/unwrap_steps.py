"""A step that is wrapped into a time dim of length one, and taken out of it again, is itself.

    a.unsqueeze(0)[0]  ->  a          a[None].unbind(0)[0]  ->  a          stack([a, b])[1]  ->  b

A layer for all steps that is called with one, or an op that `decompose` has inlined, leaves such pairs in the path of a state,
where no kernel can hold them.

Does not fire: stacks of what something writes into, since a stack is a copy; what lies in memory otherwise than a step of
the stack, where that shows.
"""

from __future__ import annotations

import torch
from torch import fx

from snn_compile.ir.values import example, is_getitem, storage_key
from snn_compile.passes.effects import memory_written, sweeping

_UNBIND = ("unbind", torch.unbind)
_UNSQUEEZE = ("unsqueeze", torch.unsqueeze)


def unwrap_steps(gm: fx.GraphModule) -> int:
    """Rewrite `gm` in place; gives how many values were unwrapped."""
    changed = {key for n in gm.graph.nodes if n.op != "call_module" for key in memory_written(n)}
    count = 0
    with sweeping(gm.graph):
        for node in list(gm.graph.nodes):
            step = _unwrapped(node, changed)
            if step is not None:
                node.replace_all_uses_with(step)
                gm.graph.erase_node(node)
                count += 1
    return count


def _unwrapped(node: fx.Node, changed: set[int | None]) -> fx.Node | None:
    """What `node` is, where that is a step taken out of its wrapping."""
    if not is_getitem(node) or type(node.args[1]) is not int:
        return None
    series, index = node.args
    if isinstance(series, fx.Node) and series.target in _UNBIND and _is_first_dim(series, 1):
        series = series.args[0]
    if not isinstance(series, fx.Node) or not isinstance(example(series), torch.Tensor):
        return None
    if series.target is torch.stack and _is_first_dim(series, 1):
        steps = series.args[0]
        known = isinstance(steps, (list, tuple)) and -len(steps) <= index < len(steps)  # type: ignore[operator]
        is_written = known and {storage_key(series), *map(storage_key, steps)} & changed  # type: ignore[arg-type]
        if not known or is_written or (_shows_layout(node) and not example(steps[index]).is_contiguous()):  # type: ignore[index, union-attr]
            return None
        return steps[index]  # type: ignore[index, return-value]
    is_wrapped = (series.target in _UNSQUEEZE and _is_first_dim(series, 1)) or (is_getitem(series) and series.args[1] is None)
    return series.args[0] if is_wrapped and index in (0, -1) else None  # type: ignore[return-value]


def _shows_layout(node: fx.Node) -> bool:
    return any(user.op == "output" or user.target == "view" for user in node.users)


def _is_first_dim(node: fx.Node, place: int) -> bool:
    dim = node.args[place] if len(node.args) > place else node.kwargs.get("dim", 0 if node.target not in _UNSQUEEZE else None)
    return isinstance(dim, int) and dim == 0 and not set(node.kwargs) - {"dim"}

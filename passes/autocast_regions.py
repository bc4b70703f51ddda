"""Regions of autocast become a property of the ops in them, and regions again when all is done.

    with autocast("cpu", bfloat16): y = linear(x[t], w)         y = linear(x[t], w)         regions(y): "cpu", bfloat16, ...
    v = v + y.float()                                    ->     v = v + y.float()

So an op can be moved, copied and batched over time alone, and whoever runs it on examples or traces it does so `under` its
regions, where it gives what it gives in eager. What was traced to ATen has its casts as ops and stands in no region any more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import fx
from torch.amp import autocast_mode

from snn_compile.ir.values import is_getitem

#: ``device type, dtype, enabled, cache_enabled``, as `torch.autocast` takes them.
Region = tuple[str, torch.dtype | None, bool, bool]
#: the outermost first
Regions = tuple[Region, ...]

#: In a node's meta: the regions of the graph that it stands in. What surrounds the whole graph is none.
_REGIONS = "autocast_regions"

# What Dynamo writes where a region begins and ends (torch 2.11 to 2.15).
_ENTER, _EXIT = autocast_mode._enter_autocast, autocast_mode._exit_autocast


def name_regions(graph: fx.Graph, around: Regions = ()) -> bool:
    """Take the switches out of `graph`, which stands in the regions `around`.

    False, and nothing done, where they do not come in pairs.
    """
    if not _is_balanced(graph):
        return False
    open_ = list(around)
    switches = []
    for node in graph.nodes:
        if node.target is _ENTER:
            open_.append(node.args)
        elif node.target is _EXIT:
            open_.pop()
        elif open_:
            node.meta[_REGIONS] = tuple(open_)
            continue
        else:
            continue
        switches.append(node)
    for node in reversed(switches):
        graph.erase_node(node)
    return True


def _is_balanced(graph: fx.Graph) -> bool:
    open_ = []
    for node in graph.nodes:
        if node.target is _ENTER:
            open_.append(node)
        elif node.target is _EXIT and (not open_ or open_.pop() is not node.args[0]):
            return False
    return not open_


def restore_regions(graph: fx.Graph) -> None:
    """Switches around all ops that stand in a region; neighbours in the same one share them."""
    open_: list[tuple[Region, fx.Node]] = []
    for node in list(graph.nodes):
        if node.op in ("placeholder", "get_attr") or is_getitem(node):
            continue
        wanted = regions(node)
        kept = 0
        while kept < min(len(open_), len(wanted)) and open_[kept][0] == wanted[kept]:
            kept += 1
        with graph.inserting_before(node):
            while len(open_) > kept:
                graph.call_function(_EXIT, (open_.pop()[1],))
            for region in wanted[kept:]:
                open_.append((region, graph.call_function(_ENTER, region)))


def regions(node: fx.Node) -> Regions:
    return node.meta.get(_REGIONS, ())  # type: ignore[no-any-return]


def put_into(node: fx.Node, where: Regions) -> None:
    if where:
        node.meta[_REGIONS] = where


def switched_off(nodes: Iterable[fx.Node]) -> Regions:
    """The regions for what `nodes` were traced to: their casts are there, and there are to be no others."""
    devices = dict.fromkeys((device, dtype) for node in nodes for device, dtype, _, _ in regions(node))
    return tuple((device, dtype, False, False) for device, dtype in devices)


@contextlib.contextmanager
def under(where: Regions) -> Iterator[None]:
    """Without autocast's cache of weights: a trace would leave its stand-ins there."""
    with contextlib.ExitStack() as stack:
        for device, dtype, enabled, _ in where:
            stack.enter_context(torch.autocast(device, dtype, enabled=enabled, cache_enabled=False))
        yield

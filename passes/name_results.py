"""A result of an `autograd.Function` that some steps of a loop read has a node in all of them, so that they are alike.

    s_0, r_0 = f(h_0); s_1, _ = f(h_1); s_2, r_2 = f(h_2)     ->     s_0, r_0 = f(h_0); s_1, r_1 = f(h_1); s_2, r_2 = f(h_2)

Dynamo writes down no result that is not read. What stays unread goes with the dead code.
"""

from __future__ import annotations

import operator
from collections import defaultdict

import torch
from torch import fx

from snn_compile.ir.values import example, is_getitem, shape_key
from snn_compile.passes.classify import AUTOGRAD_FUNCTION
from snn_compile.passes.emit import emit


def name_results(graph: fx.Graph) -> None:
    """Rewrite `graph` (torch-level, with examples) in place."""
    alike: dict[object, list[fx.Node]] = defaultdict(list)
    for call in graph.find_nodes(op="call_function", target=AUTOGRAD_FUNCTION):
        results = example(call)
        if isinstance(results, (tuple, list)) and all(isinstance(r, torch.Tensor) for r in results):
            alike[tuple((shape_key(r), r.dtype) for r in results)].append(call)
    for calls in alike.values():
        read = sorted({i for call in calls for i in _named(call)})
        for call in calls:
            named = _named(call)
            last = call
            for i in read:
                if i not in named:
                    with graph.inserting_after(last):
                        named[i] = emit(graph, "call_function", operator.getitem, (call, i), {})
                last = named[i]


def _named(call: fx.Node) -> dict[int, fx.Node]:
    return {user.args[1]: user for user in call.users if is_getitem(user)}  # type: ignore[misc]

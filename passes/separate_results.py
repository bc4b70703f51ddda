"""Results of a graph that eager keeps apart share no memory.

    return y, y[T - 1], y[2:]     ->     return y, y[T - 1].clone(), y[2:].clone()          (y: a value of all steps)

`reroll` makes a value of one step a slice of all steps' values. As a result such a slice would show: a write into one result
reaches another, `detach_` refuses views, and a state holds the memory of all steps.

Does not fire: results that share memory in eager, too; views of the graph's inputs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from snn_compile.ir.values import example, is_getitem, known_int
from snn_compile.passes.emit import emit_copy
from snn_compile.passes.views import VIEWS

_SEVERAL = {"unbind", torch.unbind, "chunk", torch.chunk, "split", torch.split}


def results_of(graph: fx.Graph) -> list[object]:
    """Examples of what the graph gives."""
    return [example(r) for r in _results(graph)]


def separate_results(graph: fx.Graph, before: Sequence[object]) -> int:
    """Rewrite `graph` in place; `before`: `results_of` the graph as Dynamo gave it. Gives how many results were copied."""
    results = _results(graph)
    sharing: dict[tuple[fx.Node, object], list[int]] = defaultdict(list)
    for i, result in enumerate(results):
        if isinstance(result, fx.Node) and isinstance(before[i], Tensor):
            sharing[_root(result)].append(i)
    copied = set()
    for (source, _), places in sharing.items():
        if source.op in ("placeholder", "get_attr"):
            copied |= {i for i in places if _apart(before[i], example(source))}
            continue
        parts = {i for i in places if _is_part(results[i], before[i])}  # type: ignore[arg-type]
        whole = min(places, key=lambda i: (i in parts, i))
        copied |= parts | {i for i in places if i != whole and any(_apart(before[i], before[j]) for j in places if j != i)}
    output = graph.output_node()
    with graph.inserting_before(output):
        new = [emit_copy(graph, r, before[i]) if i in copied else r for i, r in enumerate(results)]  # type: ignore[arg-type]
    output.args = (tuple(new),)
    return len(copied)


def _results(graph: fx.Graph) -> list[object]:
    found = graph.output_node().args[0]
    return list(found) if isinstance(found, (tuple, list)) else [found]


def _root(node: fx.Node) -> tuple[fx.Node, object]:
    """The op in whose result the node's value lies, and which of its results that is."""
    base = views_back(node)[-1]
    is_element = is_getitem(base) and isinstance(base.args[0], fx.Node) and not _is_copy(base)
    return (base.args[0], base.args[1]) if is_element else (base, None)  # type: ignore[return-value]


def views_back(node: fx.Node) -> list[fx.Node]:
    """The node and what it is a view of, back to the value that holds the memory."""
    found = [node]
    while (source := _viewed(found[-1])) is not None:
        found.append(source)
    return found


def _viewed(node: fx.Node) -> fx.Node | None:
    source = node.args[0] if node.op in ("call_function", "call_method") and node.target in VIEWS else None
    if not isinstance(source, fx.Node) or _is_copy(node):
        return None
    if source.target in _SEVERAL:
        return source.args[0]  # type: ignore[return-value]
    return None if is_getitem(node) and not isinstance(example(source), Tensor) else source


def _is_copy(node: fx.Node) -> bool:
    """An index that holds tensors or lists."""
    index = node.args[1] if is_getitem(node) else None
    return any(isinstance(i, (fx.Node, list)) for i in (index if isinstance(index, tuple) else (index,)))


def _is_part(result: fx.Node, before: Tensor) -> bool:
    """Whether the result is a part of a larger value, where eager's has memory of its own."""
    numels = [_numel(v) for v in map(example, views_back(result)) if isinstance(v, Tensor)]
    if not numels or None in numels or _numel(before) is None:
        return False
    held = known_int(before.untyped_storage().nbytes())
    return max(numels) > numels[0] and held == before.numel() * before.element_size()  # type: ignore[type-var, operator]


def _numel(value: Tensor) -> int | None:
    sizes = [known_int(s) for s in value.shape]
    return None if None in sizes else value.numel()


def _apart(a: object, b: object) -> bool:
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.untyped_storage()._cdata != b.untyped_storage()._cdata

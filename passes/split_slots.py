"""States that are kept in one tensor become tensors of their own (scalar replacement of aggregates).

    mem = zeros(2, B, N)                            m0 = full_like(mem[0], 0); m1 = full_like(mem[1], 0)
    for t in range(T):                              for t in range(T):
        mem[0] = 0.9 * mem[0] + x[t]        ->          m0.copy_(0.9 * m0 + x[t])
        mem[1] = 0.9 * mem[1] + (mem[0] > 1)            m1.copy_(0.9 * m1 + (m0 > 1))
    return mem                                      return stack([m0, m1])

`passes/functionalize` makes values of the writes then, and each slot is a state like any other. What a slot gives is the memory
itself before and after, so that a later write shows in it as it did.

Fires where the tensor is made in the graph, every use of it before the last write is a read or a write of a slot - one number
along one dim, the same in all of them -, and some slot is written into twice or in part (else it is a record, `out[t] = s`).

Does not fire: slots that are results beside the whole, views of slots, slices and masks of the whole, numbers that vary.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from snn_compile.ir.values import example, is_getitem, storage_key, wanting_grad
from snn_compile.passes.effects import is_write, written
from snn_compile.passes.emit import emit
from snn_compile.passes.hoist_creations import LIKE

#: They read no memory of the tensor that they are given.
CREATIONS = {*LIKE, torch.empty, torch.empty_like, "new_full", "new_empty"}
#: slots that nothing reads or writes: nobody keeps states in a tensor that is mostly something else
MOST_UNUSED = 64


def split_slots(graph: fx.Graph) -> int:
    """Rewrite `graph` (torch-level, with examples) in place; gives how many tensors were split."""
    found = [slots for slots in (_slots_of(node) for node in graph.nodes if _is_creation(node)) if slots is not None]
    for slots in found:
        slots.replace()
    return len(found)


def _is_creation(node: fx.Node) -> bool:
    return node.op in ("call_function", "call_method") and node.target in CREATIONS


class _Slots:
    """The reads and writes of one tensor, by slot, and its uses as a whole behind the last write."""

    def __init__(self, node: fx.Node, dim: int) -> None:
        self.node, self.dim = node, dim
        self.size = example(node).shape[dim]
        #: nodes that hold a slot's memory, and the slot: reads of it, and writes into those
        self.aliases: dict[fx.Node, int] = {}
        self.stores: dict[fx.Node, int] = {}
        self.whole: list[fx.Node] = []
        self.is_result = False

    def _start(self, part: fx.Node) -> fx.Node:
        number = LIKE[self.node.target](self.node) if self.node.target in LIKE else None
        if isinstance(number, (int, float)):
            return emit(part.graph, "call_function", torch.full_like, (part, number), {})
        return emit(part.graph, "call_method", "clone", (part,), {})

    def replace(self) -> None:
        graph = self.node.graph
        index = (slice(None),) * self.dim
        with graph.inserting_before(self.node.next):
            parts = [emit(graph, "call_function", operator.getitem, (self.node, (*index, k)), {}) for k in range(self.size)]
            slots = [self._start(part) for part in parts]
        for node, k in self.aliases.items():
            if is_getitem(node):
                node.replace_all_uses_with(slots[k])
                graph.erase_node(node)
            else:
                node.meta["example_value"] = wanting_grad(example(slots[k]), [example(node)])
        for node, k in self.stores.items():
            value = node.args[2]
            with graph.inserting_before(node):
                write = graph.call_method("copy_" if isinstance(value, fx.Node) else "fill_", (slots[k], value))
            write.meta = {**node.meta, "example_value": wanting_grad(example(slots[k]), [example(value)])}
            graph.erase_node(node)
        if self.whole:
            with graph.inserting_before(self.whole[0]):
                joined = emit(graph, "call_function", torch.stack, (slots, self.dim), {})
            joined.meta["example_value"] = wanting_grad(example(joined), [example(self.node)])
            for node in self.whole:
                node.replace_input_with(self.node, joined)


def _slots_of(node: fx.Node) -> _Slots | None:
    """What `replace` needs, where all of the module's docstring holds."""
    value = example(node)
    indexed = [u for u in node.users if _slot(u, node) is not None]
    if not isinstance(value, torch.Tensor) or not value.is_contiguous() or not indexed:
        return None
    dim, _ = _slot(indexed[0], node)  # type: ignore[misc]
    if not isinstance(value.shape[dim], int) or not 1 < value.shape[dim] <= len(indexed) + MOST_UNUSED:
        return None
    slots, order = _Slots(node, dim), list(node.graph.nodes)
    last = max((i for i, n in enumerate(order) if any(storage_key(w) == storage_key(node) for w in written(n))), default=-1)
    full: set[int] = set()
    is_record = True
    for position, user in enumerate(order):
        touches = storage_key(user) == storage_key(node) or any(storage_key(i) == storage_key(node) for i in user.all_input_nodes)
        if user is node or not touches:
            continue
        k = _take(slots, user, position > last)
        if k is None:
            return None
        if is_write(user):
            is_record = is_record and k not in full and (user in slots.stores or user.target == "copy_")
            full.add(k)
    shares = any(user.op == "output" or storage_key(user) == storage_key(node) for user in slots.whole)
    return None if is_record or (slots.is_result and shares) else slots


def _take(slots: _Slots, user: fx.Node, is_behind: bool) -> int | None:
    """Note a node that touches the memory, and give its slot; None where it cannot be split, -1 where it needs not be."""
    node = slots.node
    at = _slot(user, node)
    if at is not None:
        if at[0] != slots.dim or (user.target is operator.setitem and not _fits(user, slots)):
            return None
        k = at[1] % slots.size
        (slots.aliases if is_getitem(user) else slots.stores)[user] = k
        return k
    held = [slots.aliases[i] for i in user.all_input_nodes if i in slots.aliases]
    if node in user.all_input_nodes and _is_creation(user):
        return -1
    slots.is_result = slots.is_result or bool(held and user.op == "output")
    if node in user.all_input_nodes:  # of the whole
        slots.whole.append(user)
        return -1 if is_behind and not is_write(user) else None
    if not held or user.op == "output":
        return -1 if is_behind else None
    if storage_key(user) != storage_key(node):
        # a value of it, or a write that gives nothing back
        return held[0] if all(w in slots.aliases for w in written(user)) else None
    first = user.args[0] if user.args else None
    if not is_write(user) or first not in slots.aliases or example(user).shape != example(first).shape:
        return None  # a view
    slots.aliases[user] = slots.aliases[first]  # type: ignore[index]
    return slots.aliases[user]


def _slot(user: fx.Node, node: fx.Node) -> tuple[int, int] | None:
    """The dim and number of ``node[:, 3]``, and of ``node[:, 3] = value``."""
    if user.op != "call_function" or user.target not in (operator.getitem, operator.setitem) or user.args[0] is not node:
        return None
    index = user.args[1] if isinstance(user.args[1], tuple) else (user.args[1],)
    *before, k = index
    is_whole = all(part == slice(None) for part in before if not isinstance(part, fx.Node))
    if type(k) is not int or not is_whole or any(isinstance(part, fx.Node) for part in before):
        return None
    size = example(node).shape[len(before)]
    return (len(before), k) if isinstance(size, int) and -size <= k < size else None


def _fits(store: fx.Node, slots: _Slots) -> bool:
    """Whether what is stored is a number, or a tensor that is as the slot in all but its dtype."""
    value = store.args[2]
    if not isinstance(value, fx.Node):
        return isinstance(value, (int, float, bool))
    whole, held = example(slots.node), example(value)
    shape = whole.shape[: slots.dim] + whole.shape[slots.dim + 1 :]
    return isinstance(held, torch.Tensor) and held.shape == shape and held.device == whole.device

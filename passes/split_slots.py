"""States that are kept in one tensor become tensors of their own (scalar replacement of aggregates).

    mem = zeros(2, B, N)                            m0 = full_like(mem[0], 0); m1 = full_like(mem[1], 0)
    for t in range(T):                              for t in range(T):
        mem[0] = 0.9 * mem[0] + x[t]        ->          m0.copy_(0.9 * m0 + x[t])
        mem[1] = 0.9 * mem[1] + (mem[0] > 1)            m1.copy_(0.9 * m1 + (m0 > 1))
    return mem                                      return stack([m0, m1])

and so where slots are ranges: ``v, i = state.chunk(2, 1); v.mul_(0.9)``, ``state[:, :n] += x[t]``.

`passes/functionalize` makes values of the writes then, and each slot is a state like any other. What a slot gives is the memory
itself before and after, so that a later write shows in it as it did.

Fires where the tensor is made in the graph, every use of it from the first slot to the last write is a read or a write of a slot
- a number, or one of several ranges that do not overlap, along one dim -, and some slot is written into twice or in part (else it
is a record, `out[t] = s`). A buffer is made in the graph once `passes/work_on_copies` has copied it.

Does not fire: slots that are results beside the whole, views of slots, masks of the whole, numbers that vary, slots that are
read without gradients and used with them.
"""

from __future__ import annotations

import itertools
import operator

import torch
from torch import fx

from snn_compile.ir.values import example, shape_key, size_key, storage_key, wanting_grad
from snn_compile.passes.effects import is_write, without_gradients, written
from snn_compile.passes.emit import emit
from snn_compile.passes.functionalize import is_alias
from snn_compile.passes.hoist_creations import LIKE
from snn_compile.passes.parts import Part, indexed, part_of
from snn_compile.passes.work_on_copies import is_copy_of_buffer

#: They read no memory of the tensor that they are given.
CREATIONS = {*LIKE, torch.empty, torch.empty_like, "new_full", "new_empty"}
#: slots that nothing reads or writes: nobody keeps states in a tensor that is mostly something else
MOST_UNUSED = 64

#: Where a slot begins and ends along the dim of slots.
Bounds = tuple[int, int]


def split_slots(graph: fx.Graph) -> int:
    """Rewrite `graph` (torch-level, with examples) in place; gives how many tensors were split."""
    touching: dict[int | None, list[fx.Node]] = {}
    for node in graph.nodes:
        for key in {storage_key(node), *map(storage_key, node.all_input_nodes)}:
            touching.setdefault(key, []).append(node)
    changed = {storage_key(operand) for node in graph.nodes for operand in written(node)} - {None}
    made = [n for n in graph.nodes if n.op in ("call_function", "call_method") and storage_key(n) in changed and not is_alias(n)]
    found = [slots for node in made if (slots := _slots_of(node, touching[storage_key(node)])) is not None]
    off = without_gradients(graph)
    found = [s for s in found if all(off.issuperset(n.users) for n in s.aliases if n in off and not is_write(n))]
    for slots in found:
        slots.replace()
    return len(found)


class _Slots:
    """The reads and writes of one tensor, by slot, and its uses as a whole behind the last write."""

    def __init__(self, node: fx.Node, dim: int, is_step: bool) -> None:
        self.node, self.dim, self.is_step = node, dim, is_step
        #: nodes that hold a slot's memory, and the slot: reads of it, and writes into those
        self.aliases: dict[fx.Node, Bounds] = {}
        self.stores: dict[fx.Node, Bounds] = {}
        #: ``node.chunk(2, 1)``, of which only the pieces are read
        self.several: list[fx.Node] = []
        self.whole: list[fx.Node] = []
        self.is_result = False
        #: ``state.zero_()`` before the first slot is read
        self.early: list[fx.Node] = []

    def bounds(self) -> list[Bounds] | None:
        """All slots in order, those between them that nobody uses, too; None where they are no slots."""
        size, used = example(self.node).shape[self.dim], sorted({*self.aliases.values(), *self.stores.values()})
        ends = [0, *itertools.chain(*used), size]
        if ends != sorted(ends):
            return None
        found = [b for b in itertools.pairwise(ends) if b[0] < b[1]]
        if self.is_step:
            found = [(k, k + 1) for k in range(size)] if size - len(used) <= MOST_UNUSED else []
        # (of what was computed, ``v[0] *= 2`` is a write into a part)
        return found if found == used or (found and (self.node.target in CREATIONS or is_copy_of_buffer(self.node))) else None

    def _start(self, at: Bounds) -> fx.Node:
        graph = self.node.graph
        index = (*[slice(None)] * self.dim, at[0] if self.is_step else slice(*at))
        part = emit(graph, "call_function", operator.getitem, (self.node, index), {})
        is_filled = self.node.target in LIKE and not any(map(is_write, self.early))
        number = LIKE[self.node.target](self.node) if is_filled else None  # type: ignore[index]
        if isinstance(number, (int, float)):
            return emit(graph, "call_function", torch.full_like, (part, number), {})
        return emit(graph, "call_method", "clone", (part,), {})

    def _written_into(self, at: Bounds) -> list[object]:
        """Examples of what is written into a slot, and of what is written into where it is written into in part."""
        whole = [example(n.args[2]) for n, slot in self.stores.items() if slot == at]
        return [*whole, *(example(n) for n, slot in self.aliases.items() if slot == at and _is_written(n))]

    def replace(self) -> None:
        graph, bounds = self.node.graph, self.bounds()
        assert bounds is not None
        with graph.inserting_before((self.early or [self.node])[-1].next):
            slots = {at: self._start(at) for at in bounds}
        for at, slot in slots.items():  # (as the example of a tensor is after all writes)
            slot.meta["example_value"] = wanting_grad(example(slot), self._written_into(at))
        for node, at in self.aliases.items():
            if not is_write(node):
                node.replace_all_uses_with(slots[at])
                graph.erase_node(node)
            else:
                node.meta["example_value"] = example(slots[at])
        for node, at in self.stores.items():
            value = node.args[2]
            with graph.inserting_before(node):
                write = graph.call_method("copy_" if isinstance(value, fx.Node) else "fill_", (slots[at], value))
            write.meta = {**node.meta, "example_value": example(slots[at])}
            graph.erase_node(node)
        for node in self.several:
            graph.erase_node(node)
        if self.whole:
            with graph.inserting_before(self.whole[0]):
                join = torch.stack if self.is_step else torch.cat
                joined = emit(graph, "call_function", join, (list(slots.values()), self.dim), {})
            for node in self.whole:
                node.replace_input_with(self.node, joined)


def _is_written(alias: fx.Node) -> bool:
    return is_write(alias) or any(alias in written(user) for user in alias.users)


def _slots_of(node: fx.Node, touching: list[fx.Node]) -> _Slots | None:
    """What `replace` needs, where all of the module's docstring holds. `touching`: the nodes that have, or read, its memory."""
    value, first = example(node), next(filter(None, (_slot(user, node) for user in touching)), None)
    if not isinstance(value, torch.Tensor) or not value.is_contiguous() or first is None:
        return None
    if not isinstance(value.shape[first.dim], int) or value.shape[first.dim] < 2:
        return None
    slots = _Slots(node, first.dim, first.is_step)
    last = max(i for i, n in enumerate(touching) if any(storage_key(w) == storage_key(node) for w in written(n)))
    full: set[Bounds] = set()
    is_record = True
    place = next(i for i, user in enumerate(touching) if _is_of_slots(user, node))
    slots.early = [user for user in touching[:place] if user is not node]
    later = set(touching[place:])
    if any(storage_key(n) == storage_key(node) and not later.isdisjoint(n.users) for n in slots.early):
        return None  # a view of the whole, made before
    for position, user in enumerate(touching[place:], place):
        at = _take(slots, user, position > last)
        if at is None:
            return None
        if at and is_write(user):
            is_record = is_record and at not in full and (user in slots.stores or user.target == "copy_")
            full.add(at)
    shares = any(user.op == "output" or storage_key(user) == storage_key(node) for user in slots.whole)
    return None if is_record or (slots.is_result and shares) or slots.bounds() is None else slots


def _is_of_slots(user: fx.Node, node: fx.Node) -> bool:
    several = node in user.all_input_nodes and user.users and all(_slot(u, node) is not None for u in user.users)
    return bool(several) or _slot(user, node) is not None


def _take(slots: _Slots, user: fx.Node, is_behind: bool) -> Bounds | tuple[()] | None:
    """Note a node that touches the memory, and give its slot; None where it cannot be split, () where it needs not be."""
    node = slots.node
    part = _slot(user, node)
    if part is not None:
        if (part.dim, part.is_step) != (slots.dim, slots.is_step) or (is_write(user) and not _fits(user, part)):
            return None
        at = (part.start, part.stop)
        (slots.stores if is_write(user) else slots.aliases)[user] = at
        return at
    held = [slots.aliases[i] for i in user.all_input_nodes if i in slots.aliases]
    if node in user.all_input_nodes and user.target in CREATIONS:
        return ()
    if _is_of_slots(user, node):
        slots.several.append(user)
        return ()
    slots.is_result = slots.is_result or bool(held and user.op == "output")
    if node in user.all_input_nodes:  # of the whole
        slots.whole.append(user)
        return () if is_behind else None
    if not held or user.op == "output":
        return () if is_behind else None
    if storage_key(user) != storage_key(node):
        # a value of it, or a write that gives nothing back
        return held[0] if all(w in slots.aliases for w in written(user)) else None
    first = user.args[0] if user.args else None
    if not is_write(user) or first not in slots.aliases or shape_key(example(user)) != shape_key(example(first)):  # type: ignore[arg-type]
        return None  # a view
    slots.aliases[user] = slots.aliases[first]  # type: ignore[index]
    return slots.aliases[user]  # type: ignore[index]


def _slot(user: fx.Node, node: fx.Node) -> Part | None:
    """The part of `node` that is read, or that ``node[:, 3] = value`` writes."""
    if user.target is operator.setitem:
        return indexed(node, user.args[1]) if user.args[0] is node else None
    part = part_of(user)
    return part if part is not None and part.source is node else None


def _fits(store: fx.Node, part: Part) -> bool:
    """Whether what is stored is a number, or a tensor that is as the slot in all but its dtype."""
    value = store.args[2]
    if not isinstance(value, fx.Node):
        return isinstance(value, (int, float, bool))
    whole, held = example(part.source), example(value)
    assert isinstance(whole, torch.Tensor)
    if not isinstance(held, torch.Tensor) or held.device != whole.device:
        return False
    length = () if part.is_step else (part.stop - part.start,)
    return shape_key(held) == tuple(map(size_key, (*whole.shape[: part.dim], *length, *whole.shape[part.dim + 1 :])))

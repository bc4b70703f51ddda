"""Layers that a step has of its own are moved out from between the steps.

    v = 0.9*v + norm[0](fc(x[0])); s0 = v >= 1; o = o + read[0](s0)        y0 = fc(x[0]); y1 = fc(x[1])
    v = 0.9*v + norm[1](fc(x[1])); s1 = v >= 1; o = o + read[1](s1)   ->   z0 = norm[0](y0); z1 = norm[1](y1)
                                                                           v = 0.9*v + z0; s0 = v >= 1
                                                                           v = 0.9*v + z1; s1 = v >= 1
                                                                           o = o + read[0](s0); o = o + read[1](s1)

What is left are equal steps, which `reroll` takes. To the front goes what no state reaches, with all that it is made of; to the
back what reaches no state, with all that is made of it. (Batch norm through time - Kim and Panda 2021, "Revisiting batch
normalization for training low-latency deep spiking neural networks from scratch" - has statistics and weights for each step.)

The layers of a network take turns: what goes to the back are the later ones, in whose steps the next layer is found.

Does not fire: a layer of a step's own that a state goes through, as in a deep network, whose layers look alike, too; draws of
random numbers that would change their order; writes into a tensor that something else in the steps uses; a switch of gradients
in the steps; nothing is carried in the rest.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

from torch import fx

from snn_compile.ir.values import example, storage_key
from snn_compile.passes.effects import draws, has_effect, written
from snn_compile.passes.find_repeats import Repeat, find_repeats
from snn_compile.passes.loop_operands import is_no_larger
from snn_compile.passes.relate_iterations import Column, Graph, Run

#: Of a node: it is no part of a loop, and known for it.
MOVED = "own_layer"
#: Of a network with so many layers, the others stay where they are.
MOST_MOVES = 64
#: Look-alikes that are tried, those that cover most first.
MOST_REPEATS = 16


def move_own_layers(gm: fx.GraphModule) -> int:
    """Reorders the nodes of `gm` (torch-level, with examples); gives how many layers of a step were moved, each time."""
    return sum(itertools.takewhile(bool, (_move_first(Graph(gm)) for _ in range(MOST_MOVES))))


def _move_first(view: Graph) -> int:
    seen: set[int] = set()
    for repeat in find_repeats(view.tokens)[:MOST_REPEATS]:
        nodes = range(repeat.start, repeat.stop)
        is_within = 2 * len(seen.intersection(nodes)) > len(nodes)  # (what looks alike within the steps of a loop is not touched)
        if is_within or any(view.nodes[i].meta.get(MOVED) for i in nodes) or _takes_turns(view, repeat):
            continue
        seen.update(nodes)
        if not _changes_given(view, repeat):
            continue
        run = view.relate(repeat)
        if run.stop - run.start < 2 * run.period:
            continue
        steps = _Steps(view, run)
        if (own := steps.own()) and steps.move(own):
            return len(own)
    return 0


def _changes_given(view: Graph, repeat: Repeat) -> bool:
    """Whether the first two iterations read different parameters or buffers somewhere: told without relating them all."""
    first = range(repeat.start, repeat.start + repeat.period)
    pairs = (zip(view.slots[i].leaves, view.slots[i + repeat.period].leaves, strict=True) for i in first)
    return any(a is not b and _is_given(a) and _is_given(b) for pair in pairs for a, b in pair)


def _takes_turns(view: Graph, repeat: Repeat) -> bool:
    """Whether the same few parameters come again and again: these are parts of a step that look alike, such as two networks."""
    for first in range(repeat.start, repeat.start + repeat.period):
        for column in zip(*(view.slots[i].leaves for i in range(first, repeat.stop, repeat.period)), strict=True):
            if column[0] is not column[1] and all(map(_is_given, column)) and _is_periodic(column):
                return True
    return False


def _is_periodic(column: tuple[object, ...]) -> bool:
    lags = (lag for lag in range(2, len(column) // 2 + 1) if column[lag] is column[0])
    return any(all(a is b for a, b in zip(column, column[lag:], strict=False)) for lag in lags)


def _is_given(leaf: object) -> bool:
    return isinstance(leaf, fx.Node) and leaf.op in ("placeholder", "get_attr")


class _Steps:
    """The iterations of one run, by residue: the place of a node in its iteration."""

    def __init__(self, view: Graph, run: Run) -> None:
        self.view, self.run = view, run
        self.nodes = view.nodes[run.start : run.stop]
        residues = range(run.period)
        #: by residue, what it reads and who reads it, in the same iteration or over iterations
        self.reads = {r: {(r - c.distance) % run.period for c in run.columns[r] if c.kind == "distance"} for r in residues}
        self.read_by: dict[int, set[int]] = {r: set() for r in residues}
        for reader, read in self.reads.items():
            for r in read:
                self.read_by[r].add(reader)

    def positions(self, residue: int) -> range:
        run = self.run
        return range(run.start + (residue + run.origin - run.start) % run.period, run.stop, run.period)

    def instances(self, residues: set[int]) -> list[fx.Node]:
        return [self.view.nodes[i] for i in sorted(i for r in residues for i in self.positions(r))]

    # ------------------------------------------------------------------------------------------------------ what is its own

    def own(self) -> set[int]:
        """Layers that read parameters or buffers of their own in every step, which no series can stand for."""
        return {r for r in range(self.run.period) if any(self._is_own(r, slot) for slot in range(len(self.run.columns[r])))}

    def _is_own(self, residue: int, slot: int) -> bool:
        column: Column = self.run.columns[residue][slot]
        if column.kind != "series" or column.step:
            return False
        leaves = [self.view.slots[i].leaves[slot] for i in self.positions(residue)]
        if not all(map(_is_given, leaves)):
            return False
        node, leaf = self.view.nodes[self.positions(residue)[0]], leaves[0]
        return leaf in written(node) or not self.run.reads_time() or not is_no_larger(example(leaf), example(node))

    # ------------------------------------------------------------------------------------------------------------- moving

    def move(self, own: set[int]) -> bool:
        """Whether all of `own` went to the front or to the back."""
        if self._switches_modes():
            return False
        front: set[int] = set()
        back: set[int] = set()
        for r in own:
            above = self._closure(r, self.reads)
            if not self._is_carried_among(above):
                front |= above
            elif r in self._closure_of(self.reads[r], self.reads):
                return False  # (it is part of a state's way)
            else:
                back |= self._closure(r, self.read_by)
        rest = set(range(self.run.period)) - front - back
        if front & back or not self._is_carried_among(rest) or any(self.reads[r] & back for r in rest | front):
            return False
        parts = [self._layer_by_layer(front), self.instances(rest), self.instances(back)]
        if sum(any(map(draws, part)) for part in parts) > 1 or not (self._may_move(parts[0]) and self._may_move(parts[2])):
            return False
        if self._read_from_within(parts[0], lambda n: n.all_input_nodes) or self._read_from_within(parts[2], lambda n: n.users):
            return False
        _to_front(parts[0], parts[1][0])
        _to_back(parts[2], parts[1][-1])
        for node in parts[0]:
            node.meta[MOVED] = True
        self.view.gm.graph.lint()
        return True

    def _layer_by_layer(self, residues: set[int]) -> list[fx.Node]:
        """All steps of a layer, then those of the next, so that each is a loop: the layers do not reach themselves."""
        ordered = sorted(residues, key=lambda r: (len(self._closure_of(self.reads[r], self.reads)), r))
        layers = [self.instances({r}) for r in ordered]
        changed = {storage_key(w) for layer in layers for n in layer for w in written(n)}
        touched = [{storage_key(i) for n in layer for i in n.all_input_nodes} & changed for layer in layers]
        is_shared = sum(map(len, touched)) > len(set().union(*touched))  # (statistics that two layers update)
        if is_shared or sum(draws(layer[0]) for layer in layers) > 1:  # these stay in the order of the steps
            return self.instances(residues)
        return list(itertools.chain(*layers))

    def _closure(self, residue: int, edges: dict[int, set[int]]) -> set[int]:
        return {residue} | self._closure_of(edges[residue], edges)

    @staticmethod
    def _closure_of(first: set[int], edges: dict[int, set[int]]) -> set[int]:
        found, todo = set(first), list(first)
        while todo:
            new = edges[todo.pop()] - found
            found |= new
            todo += new
        return found

    def _is_carried_among(self, residues: set[int]) -> bool:
        """Whether some value of them is handed from one iteration to the next, among themselves."""
        return any(
            r in self._closure_of(self.reads[r] & residues, {q: self.reads[q] & residues for q in residues}) for r in residues
        )

    def _may_move(self, part: list[fx.Node]) -> bool:
        """Whether nothing else in the run writes what it reads, or reads what it writes."""
        together = set(part)
        others = [n for n in self.nodes if n not in together]
        read = {storage_key(i) for n in others for i in n.all_input_nodes}
        changed = {storage_key(w) for n in others for w in written(n)}
        for node in part:
            into = written(node)
            if any(storage_key(w) in read or not _is_given(w) for w in into):
                return False
            if changed and any(storage_key(i) in changed for i in node.all_input_nodes):
                return False
        return True

    def _switches_modes(self) -> bool:
        """Gradients are switched between the ops (or who knows what a call does)."""
        return any(has_effect(n) and not written(n) and not draws(n) for n in self.nodes)

    def _read_from_within(self, part: list[fx.Node], neighbours: Callable[[fx.Node], Iterable[fx.Node]]) -> bool:
        """Whether some neighbour of the part is another node of the run (the ends of a run may read others than its middle)."""
        others = set(self.nodes) - set(part)
        return any(other in others for node in part for other in neighbours(node))


def _to_front(nodes: list[fx.Node], first: fx.Node) -> None:
    """(With the bodies of functions that they call.)"""
    for node in nodes:
        for operand in node.all_input_nodes:
            if operand.op == "get_attr":
                first.prepend(operand)
        first.prepend(node)


def _to_back(nodes: list[fx.Node], last: fx.Node) -> None:
    for node in nodes:
        last.append(node)
        last = node

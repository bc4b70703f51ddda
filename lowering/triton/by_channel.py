"""A step whose calls only look along one channel -> a Triton kernel in which a program owns whole channels and runs all steps.

    for t: h = charge(v, x[t]); y = batch_norm(h); s = H(y - 1); v = reset(y, s)                T launches of each, through memory
    ->  for t: h = …; mean = sum(h) / size; invstd = …; s[t], v = … fma(weight * (h - mean), invstd, bias) …           one launch

There are two forms. Where a program's channels fit into its registers, a whole value is a variable, and so is the state from step
to step. Where they do not, each stretch of regions between two sums is a loop over tiles; what a later one reads goes through
scratch memory of the program's own. What a batch norm gives is never stored: each reader computes it again from ``h``.

Statistics are summed in fp32 in the order of Triton's reduction, the variance around the mean; ATen's kernels and cuDNN's add up
in other orders. So they, and what is normalised with them, are eager's to rounding and not bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from operator import getitem

import torch

from snn_compile.ir.stepped import Call, Program, Region, Slot
from snn_compile.lowering.channel_program import RESHAPES, Given, Shapes, Unsupported, Wanted, slots_read
from snn_compile.lowering.triton.analysis import needed, output_nodes
from snn_compile.lowering.triton.channel_layout import ChannelLayout
from snn_compile.lowering.triton.channel_norm import Norm, Reduction, norm_backward, norm_forward
from snn_compile.lowering.triton.channel_tensors import NAMED, TILE, ChannelTensor, group_strides, lane_lines, program_lines
from snn_compile.lowering.triton.emit import Emitter, op_name, user_name
from snn_compile.lowering.triton.memory import Argument, as_block
from snn_compile.lowering.triton.names import Names, identifier
from snn_compile.lowering.triton.text import KernelText, indent, mentions, module_text, used
from snn_compile.lowering.triton.values import Value, number

aten = torch.ops.aten
F32 = torch.float32


@dataclass(frozen=True)
class Form:
    """`tiled`: a program's channels do not fit into its registers; `reverse`: the last step comes first."""

    tiled: bool
    reverse: bool


def generate(
    name: str,
    program: Program,
    shapes: Shapes,
    given: Sequence[Given],
    wanted: Sequence[Wanted],
    layout: ChannelLayout,
    form: Form,
) -> KernelText:
    """The kernel; `layout` places the tensors of `given`, then those of `wanted`. Raises `Unsupported`."""
    return _Writer(name, program, shapes, given, wanted, layout, form).kernel()


class _Writer:
    def __init__(
        self,
        name: str,
        program: Program,
        shapes: Shapes,
        given: Sequence[Given],
        wanted: Sequence[Wanted],
        layout: ChannelLayout,
        form: Form,
    ) -> None:
        self.name, self.program, self.shapes = name, program, shapes
        self.given, self.wanted, self.layout, self.form = given, wanted, layout, form
        self.names = Names(NAMED | {f"lanes_{i}" for i in range(len(layout.groups))} | {"lanes"})
        self.lines: list[str] = []
        self.tensors: dict[tuple[str, int], ChannelTensor] = {}
        self.scratch: list[Argument] = []
        self.strides = group_strides(layout, self.names)
        #: slot of a channel's value -> its text, of shape ``[1, CHANNELS]``
        self.channel: dict[int, Value] = {}
        #: slot of a whole value -> its variable: in this step, or, where there are tiles, in this tile
        self.here: dict[int, Value] = {}
        #: slot of a whole value -> its text, where it lies in memory
        self.place: dict[int, str] = {}
        #: slot of a whole value that is not stored -> what it is made from, and its text from theirs
        self.made: dict[int, tuple[tuple[int, ...], Callable[..., str]]] = {}
        #: slot of a batch norm -> its results
        self.norms: dict[int, Norm] = {}
        #: slot of a state that lies in scratch memory -> the memory, with halves for the old and the new value of a step
        self.states: dict[int, str] = {}
        #: slot of a channel's value -> the variable that adds it up over the steps
        self.sums: dict[int, str] = {}
        #: regions that wait for the next sum over the channel
        self.waiting: list[Region] = []
        #: slots of whole values that are stored in their series
        self.stored: set[int] = set()
        self.label = _labels(program, given)
        self.carries = [g for g in given if g.kind == "carry"]

    def line(self, *lines: str) -> None:
        self.lines += lines

    # ------------------------------------------------------------------------------------------------------------ the whole

    def kernel(self) -> KernelText:
        self._declare()
        self._begin()
        head, self.lines = self.lines, []
        loads = self._loads_of_step()
        for i, unit in enumerate(self.program.units):
            if isinstance(unit, Call):
                self._call(unit, self.program.units[i:])
            elif self.shapes.of_region(unit):
                self.waiting.append(unit)
            else:
                self._channel_region(unit)
        self._pass(Reduction(), last=True)
        self._end_of_step()
        step = used(loads, self.lines) + self.lines
        self.lines = []
        self._end()
        if self.form.reverse:
            loop = ["for i in range(T):", *indent(["t = T - 1 - i", *step])]
        else:
            loop = ["for t in range(T):", *indent(step)]
        return self._assemble([*head, *loop, *self.lines])

    def _declare(self) -> None:
        """Every tensor of the call, in order."""
        own = [(kind, g.slot) for g in self.given for kind in ("after", "init")[2 - g.tensors :]]
        own += [(w.kind, w.slot) for w in self.wanted]
        if len(set(own)) < len(own):
            raise Unsupported
        bases = Names(set())
        for position, (kind, slot) in enumerate(own):
            group = self.layout.group_of[position]
            is_number = kind == "init" and self.shapes.tensor(slot).dim() == 0  # which any channel reads at stride 0
            if not (is_number or self.shapes.is_channel(slot) if group is None else self.shapes.is_whole(slot)):
                raise Unsupported
            is_unit = group is not None and (self.layout.groups[group].unit_lane or self.layout.groups[group].unit_channel)
            label = self.label.get(slot, "result")
            base = bases.unique({"init": label, "series": f"{label}_seq"}.get(kind, f"{label}_{kind}"))
            self.tensors[kind, slot] = ChannelTensor(self.names, base, position, group, is_unit)

    def _assemble(self, body: list[str]) -> KernelText:
        lanes = [] if self.form.tiled else lane_lines(self.layout, self.strides, "")
        body = used([*program_lines(), *lanes], body) + body
        text = "\n".join(body)
        own = [a for t in self.tensors.values() for a in t.arguments]
        sizes = [Argument("T", "T"), *(Argument(n, "size", dim=d, aligned=self._sees(n)) for d, n in enumerate(_SIZES))]
        arguments = [a for a in own if a.kind == "pointer"] + self.scratch + sizes
        arguments += [a for a in own if a.kind != "pointer"] + self.strides
        return module_text(
            self.name,
            [f"{self.name}: all steps of a channel at a time"],
            [a for a in arguments if mentions(text, a.name)],
            ["BLOCK", "CHANNELS", "INDEX"],
            body,
        )

    def _sees(self, size: str) -> bool:
        """Whether accesses are wide only where this size is a multiple of 16."""
        if size == "channels":
            return self.layout.channels > 1
        return any(g.unit_lane for g in self.layout.groups) and size == ("rows" if self.layout.flat else "inner")

    # ----------------------------------------------------------------------------------------------------- before the steps

    def _begin(self) -> None:
        for g in self.given:
            if g.kind == "zero":
                self.channel[g.slot] = number(0.0, F32)
                continue
            tensor = self.tensors["init", g.slot]
            if g.kind == "carry":
                self._begin_carry(g, tensor)
            elif g.kind == "const" and tensor.group is None:
                self._load_channel(g, tensor.load(), self.lines)
            elif g.kind == "const":
                self.place[g.slot] = tensor.load()
        for w in self.wanted:
            if w.kind == "sum":
                self.sums[w.slot] = self.names.unique(f"{self.label.get(w.slot, 'result')}_sum")
                self.line(f"{self.sums[w.slot]} = tl.zeros([1, CHANNELS], tl.float32)")

    def _begin_carry(self, g: Given, tensor: ChannelTensor) -> None:
        if g.next is None or g.next in [other.slot for other in self.given]:
            raise Unsupported
        if tensor.group is None:
            self._load_channel(g, tensor.load(), self.lines)
        elif not self.form.tiled:
            self.here[g.slot] = Value.variable(self.names.unique(self.label[g.slot]), F32)
            self.line(f"{self.here[g.slot].text} = {tensor.load()}")
        else:
            self.states[g.slot] = self._buffer(f"{self.label[g.slot]}_state", 2)
            self.place[g.slot] = f"tl.load({self._state(g.slot, self.step)}, mask=inside)"
            with self._tiles():
                self.line(f"tl.store({self._state(g.slot, '0')}, {tensor.load()}, mask=inside)")

    @property
    def step(self) -> str:
        """Counts the steps in the order in which they run."""
        return "i" if self.form.reverse else "t"

    def _state(self, slot: int, step: str) -> str:
        """The half of a state's memory that step number `step` reads."""
        return f"{self.states[slot]} + (2 * program + {step} % 2) * area + home"

    def _next_state(self, slot: int) -> str:
        return self._state(slot, f"({self.step} + 1)")

    def _buffer(self, base: str, values: int = 1) -> str:
        name = self.names.unique(f"{identifier(base)[:40]}_ptr")
        self.scratch.append(Argument(name, "scratch", len(self.scratch), values, aligned=True, dtype=F32))
        return name

    def _load_channel(self, g: Given, load: str, lines: list[str]) -> None:
        self.channel[g.slot] = Value.variable(self.names.unique(self.label[g.slot]), F32)
        lines.append(f"{self.channel[g.slot].text} = {load}")

    # --------------------------------------------------------------------------------------------------------------- a step

    def _loads_of_step(self) -> list[str]:
        """Of a channel's values, which the step may use or not; whole values are loaded where they are read."""
        lines: list[str] = []
        for g in self.given:
            if g.kind == "series" and self.shapes.is_whole(g.slot):
                self.place[g.slot] = self.tensors["init", g.slot].load("t")
            elif g.kind == "series":
                self._load_channel(g, self.tensors["init", g.slot].load("t"), lines)
            elif g.kind == "before" and not self.shapes.is_whole(g.slot):
                raise Unsupported
        return lines

    def _before(self, slot: int) -> str:
        """``initial state if t == 0 else state after step t - 1``"""
        init, after = self.tensors["init", slot], self.tensors["after", slot]
        first = self.names.unique(f"{self.label[slot]}_first")
        self.line(f"{first} = tl.load({init.address()}, mask=inside & (t == 0))")
        return f"tl.load({after.address('(t - 1)')}, mask=inside & (t > 0), other={first})"

    @contextmanager
    def _tiles(self) -> Iterator[None]:
        """What is written inside runs for every tile; threads see what others stored before it."""
        if not self.form.tiled:
            yield
            return
        before, self.lines, self.here = self.lines, [], {}
        yield
        body, self.lines, self.here = self.lines, before, {}
        body = used(lane_lines(self.layout, self.strides, "start"), body) + body
        self.line("tl.debug_barrier()", "for start in range(0, count, BLOCK):", *indent(body))

    def _pass(self, reduction: Reduction, rest: Sequence[Region | Call] = (), last: bool = False) -> None:
        """The regions that wait, and the sums; `rest`: what follows in this step."""
        regions, self.waiting = self.waiting, []
        read = {s for unit in rest for s in slots_read(unit)}
        self.line(*reduction.start)
        with self._tiles():
            for region in regions:
                self._region(region, read)
            for slots, lines in reduction.each:
                self.line(*lines(*(self.value(s).text for s in slots)))
            if last:
                self._whole_results()
        self.line(*reduction.end)

    def _region(self, unit: Region, read_later: set[int]) -> None:
        graph = unit.kernel.step.graph
        placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        made = output_nodes(graph)
        emitter = Emitter(self.names, {p: self.value(s) for p, s in zip(placeholders, unit.inputs, strict=True)})
        emitter.emit(needed(graph, made), [m for m in made if m is not None], named=True)
        self.line(*map(str, emitter.statements))
        for slot, node in zip(unit.outputs, made, strict=True):
            assert node is not None
            self.here[slot] = emitter.env[node]
            self._store(slot, slot in read_later)

    def _store(self, slot: int, is_read_later: bool) -> None:
        """A value of a region goes where it is wanted, and, from one tile loop to another, through memory."""
        value = as_block(self.here[slot], TILE)
        addresses = [self.tensors["series", slot].address("t")] if ("series", slot) in self.tensors else []
        self.stored.add(slot)
        if self.form.tiled:
            addresses += [self._next_state(g.slot) for g in self.carries if g.next == slot and g.slot in self.states]
            if is_read_later and not addresses:
                addresses.append(f"{self._buffer(f'{self.label[slot]}_values')} + program * area + home")
            if addresses:
                self.place[slot] = f"tl.load({addresses[0]}, mask=inside)"
        self.line(*(f"tl.store({address}, {value}, mask=inside)" for address in addresses))

    def value(self, slot: int) -> Value:
        """A channel's value; a whole one as a variable, loaded or computed where it is not there yet."""
        if slot in self.channel:
            return replace(self.channel[slot], block=False)
        if slot in self.here:
            return self.here[slot]
        if slot in self.made:
            sources, make = self.made[slot]
            text = make(*(self.value(s).text for s in sources))
        elif slot in self.place:
            text = self.place[slot]
        elif ("after", slot) in self.tensors:
            text = self._before(slot)
        else:
            raise Unsupported
        variable = self.names.unique(self.label.get(slot, "value"))
        self.line(f"{variable} = {text}")
        self.here[slot] = Value.variable(variable, F32)
        return self.here[slot]

    def _channel_region(self, unit: Region) -> None:
        graph = unit.kernel.step.graph
        placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        made = output_nodes(graph)
        emitter = Emitter(self.names, {p: self.of_channel(s) for p, s in zip(placeholders, unit.inputs, strict=True)})
        emitter.emit(needed(graph, made), [m for m in made if m is not None], named=True)
        self.line(*map(str, emitter.statements))
        self.channel |= {slot: emitter.env[node] for slot, node in zip(unit.outputs, made, strict=True)}  # type: ignore[index]

    def of_channel(self, slot: int) -> Value:
        if slot not in self.channel:
            raise Unsupported
        return self.channel[slot]

    # ---------------------------------------------------------------------------------------------------------------- calls

    def _call(self, unit: Call, rest: Sequence[Region | Call]) -> None:
        """`rest`: this call and what follows it."""
        if unit.target is getitem:
            self._part(unit)
        elif unit.target in RESHAPES:
            (slot, *_) = unit.args
            if not isinstance(slot, Slot) or not self.shapes.is_channel(unit.output):
                raise Unsupported
            self.channel[unit.output] = self.of_channel(slot.index)
        elif unit.target is aten.native_batch_norm.default:
            self._norm(norm_forward(unit, self.of_channel, self.names, self.form.tiled), unit, rest)
        elif unit.target is aten.native_batch_norm_backward.default:
            self._norm(norm_backward(unit, self.of_channel, self.names, self.form.tiled), unit, rest)
        else:
            raise Unsupported

    def _norm(self, norm: Norm, unit: Call, rest: Sequence[Region | Call]) -> None:
        if not all(self.shapes.is_whole(s) for s in norm.whole[0]):
            raise Unsupported
        self._pass(norm.reduction, rest)
        self.norms[unit.output] = norm

    def _part(self, unit: Call) -> None:
        source, i = unit.args
        norm = self.norms.get(source.index) if isinstance(source, Slot) else None
        if norm is None or i not in (0, 1, 2):
            raise Unsupported
        if i == 0:
            self.made[unit.output] = norm.whole
        else:
            self.channel[unit.output] = Value.variable(norm.of_channel[i - 1], F32)  # type: ignore[operator]

    # ------------------------------------------------------------------------------------------------------ after the units

    def _whole_results(self) -> None:
        """What no region has stored: values that are made, or given."""
        for w in self.wanted:
            if w.kind == "series" and self.shapes.is_whole(w.slot) and w.slot not in self.stored:
                self.line(self.tensors["series", w.slot].store(as_block(self.value(w.slot), TILE), "t"))
        for g in self.carries:
            if g.slot in self.states and g.next not in self.stored:
                assert g.next is not None
                self.line(f"tl.store({self._next_state(g.slot)}, {as_block(self.value(g.next), TILE)}, mask=inside)")

    def _end_of_step(self) -> None:
        for w in self.wanted:
            if w.kind == "sum":
                self.line(f"{self.sums[w.slot]} += {self.of_channel(w.slot).text}")
            elif w.kind == "series" and not self.shapes.is_whole(w.slot):
                value = as_block(self.of_channel(w.slot), "[1, CHANNELS]")
                self.line(self.tensors["series", w.slot].store(value, "t"))
        following = {}
        for g in self.carries:
            assert g.next is not None
            if not self.shapes.is_whole(g.slot):
                following[self.channel[g.slot].text] = as_block(self.of_channel(g.next), "[1, CHANNELS]")
            elif not self.form.tiled:
                following[self.here[g.slot].text] = as_block(self.value(g.next), TILE)
        if any(text in following for text in following.values()):  # one state becomes another
            raise Unsupported
        self.line(*(f"{name} = {text}" for name, text in following.items()))

    def _end(self) -> None:
        for w in self.wanted:
            tensor = self.tensors[w.kind, w.slot]
            if w.kind == "sum":
                self.line(tensor.store(self.sums[w.slot]))
            elif w.kind == "final" and tensor.group is None:
                self.line(tensor.store(self.of_channel(w.slot).text))
            elif w.kind == "final" and not self.form.tiled:
                self.line(tensor.store(self.here[w.slot].text))
            elif w.kind == "final":
                with self._tiles():
                    self.line(tensor.store(f"tl.load({self._state(w.slot, 'T')}, mask=inside)"))


_SIZES = ("rows", "inner", "channels")


_PARTS = {
    aten.native_batch_norm.default: ("normalised", "mean", "invstd"),
    aten.native_batch_norm_backward.default: ("grad_h", "grad_weight", "grad_bias"),
}


def _labels(program: Program, given: Sequence[Given]) -> dict[int, str]:
    """What values, and the tensors that hold them, are called."""
    labels = {g.slot: g.name for g in given}
    parts: dict[int, tuple[str, ...]] = {}
    for unit in program.units:
        if isinstance(unit, Region):
            nodes = output_nodes(unit.kernel.step.graph)
            labels |= {s: user_name(n) or op_name(n) for s, n in zip(unit.outputs, nodes, strict=True) if n is not None}
        elif unit.target in _PARTS:
            parts[unit.output] = _PARTS[unit.target]  # type: ignore[index]
        elif unit.target is getitem:
            source, i = unit.args
            if isinstance(source, Slot) and isinstance(i, int) and i < len(parts.get(source.index, ())):
                labels[unit.output] = parts[source.index][i]
    return labels

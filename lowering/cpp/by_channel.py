"""A step whose calls only look along one channel -> C++ in which a thread owns whole channels and runs all steps.

    for t: h = charge(v, x[t]); y = batch_norm(h); s = H(y - 1); v = reset(y, s)          T launches of each, through memory
    ->  for channel: for t: h = …, mean, invstd of h; s[t], v = … h*scale + shift …        one launch; h and v stay in cache

for values ``[N, C, *space]``, and per-channel values ``[C]``. The loops over a channel's values, which go by the layout in
memory, are written by `channel_text` and its two layouts, batch norm by `channel_norm`; here is what a program's units become.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import getitem

import torch
from torch import fx

from snn_compile.ir.stepped import Call, Program, Region, Slot
from snn_compile.lowering.channel_program import RESHAPES, Given, Shapes, Unsupported, Wanted, slots_read, summed
from snn_compile.lowering.cpp.channel_blocks import ChannelBlocks
from snn_compile.lowering.cpp.channel_norm import Part, first_pass, is_norm, norm
from snn_compile.lowering.cpp.channel_rows import ChannelRows
from snn_compile.lowering.cpp.channel_text import IN_BUFFER, ChannelText, Lane, Sum
from snn_compile.lowering.cpp.emit import Emitter, Text, results
from snn_compile.lowering.cpp.names import comment
from snn_compile.lowering.cpp.prelude import prelude


@dataclass(frozen=True)
class ChannelSource:
    """The text of a kernel ``entry(tensors, strides, steps, channels, rows, <two of the layout>, threads, scratch)``.

    `strides` has three numbers a tensor - step, row, channel - in elements; a tensor of channels has two, and 0.
    """

    entry: str
    text: str
    #: how many the kernel is given
    tensors: int
    #: arrays of ``rows*inner`` floats that a thread needs
    buffers: int
    #: of a whole value, ``[N, C, *space]``
    shape: torch.Size
    #: channels lie together in memory: the layout's parameters are those of `ChannelBlocks`, else of `ChannelRows`
    is_channels_last: bool = False
    #: the most sums that threads add up at once
    sums: int = 0


def generate(
    name: str,
    program: Program,
    values: Sequence[torch.Tensor],
    given: Sequence[Given],
    wanted: Sequence[Wanted],
    reverse: bool,
    is_channels_last: bool = False,
) -> ChannelSource:
    """`values`: an example of each slot (of one step), in eager's layout; `is_channels_last`: the operands' layout.

    Raises `Unsupported`.
    """
    shapes = Shapes(values)
    if len(shapes.whole) == 2 and not is_channels_last:
        raise Unsupported
    text = ChannelBlocks(shapes, reverse) if is_channels_last else ChannelRows(shapes, reverse)
    return _Writer(name, program, given, wanted, text).source()


class _Writer:
    def __init__(self, name: str, program: Program, given: Sequence[Given], wanted: Sequence[Wanted], text: ChannelText) -> None:
        self.name, self.program, self.given, self.wanted = name, program, given, wanted
        self.text, self.shapes, self.values = text, text.shapes, text.values
        self.series = {w.slot for w in wanted if w.kind == "series"}
        #: ``(kind, slot)`` of what is given and wanted -> what its tensor is called
        self.tensor: dict[tuple[str, int], str] = {}
        #: slot of a call with several results -> each of them
        self.parts: dict[int, tuple[Part, ...]] = {}
        #: slot of a call -> the sums it needs that the loop of a region has made
        self.summed: dict[int, list[str]] = {}
        #: slots of whole values that the loop of a region has stored in their series
        self.stored: set[int] = set()

    # ------------------------------------------------------------------------------------------------------------ the whole

    def source(self) -> ChannelSource:
        text = self.text
        self._declare()
        self._body()
        lines = [
            comment(f"{self.name}: all steps of a {text.unit} at a time"),
            "",
            *(f"#include {header}" for header in text.includes),
            prelude(text.helpers),
            f'extern "C" void {self.name}(',
            "    float* const* tensors, const int64_t* strides, int64_t steps, int64_t channels, int64_t rows,",
            f"    {text.parameters}, int64_t threads, float* scratch) {{",
            *text.lines,
            "}",
            "",
        ]
        return ChannelSource(
            self.name,
            "\n".join(lines),
            len(self.tensor),
            len(text.buffers),
            self.shapes.whole,
            text.is_channels_last,
            text.most_sums,
        )

    def _declare(self) -> None:
        """A pointer and strides for every tensor, in the order of `given` and `wanted`."""
        given = [(kind, g.slot, g.name) for g in self.given for kind in ("after", "init")[2 - g.tensors :]]
        wanted = [(w.kind, w.slot, "") for w in self.wanted]
        if len(set(wanted)) < len(wanted):
            raise Unsupported
        for i, (kind, slot, own) in enumerate(given + wanted):
            name = self.text.names.unique(f"{own}_{kind}" if kind == "after" else own or f"result_{i}")
            self.tensor[kind, slot] = name
            self.text.line(f"float* const {name} = tensors[{i}];")
            parts = [f"{name}_{part} = strides[{3 * i + j}]" for j, part in enumerate(("step", "row", "channel"))]
            self.text.line(f"const int64_t {', '.join(parts)};")

    def _body(self) -> None:
        text = self.text
        head, text.lines = text.lines, []
        text.depth = 3
        text.begin_channel()
        self._begin()
        loop = "int64_t t = steps - 1; t >= 0; --t" if text.reverse else "int64_t t = 0; t < steps; ++t"
        with text.braces(f"for ({loop})"):
            self._step()
        self._end()
        inside, text.lines, text.depth = text.lines, head, 1
        text.all_channels(inside)

    # ----------------------------------------------------------------------------------------------------- before the steps

    def _begin(self) -> None:
        for g in self.given:
            if g.kind == "zero":
                self.values.channel[g.slot] = "0.0f"
                continue
            whole = self.shapes.is_whole(g.slot)
            is_number = g.kind == "const" and self.shapes.tensor(g.slot).dim() == 0
            if not whole and not self.shapes.is_channel(g.slot) and not is_number:
                raise Unsupported
            name = self.tensor["init", g.slot]
            if g.kind == "const":
                self._keep(g.slot, name, None)
            elif g.kind == "carry":
                self._begin_carry(g, name, whole)
        for w in self.wanted:
            if w.kind == "sum":
                if not self.shapes.is_channel(w.slot):
                    raise Unsupported
                self.text.variable(f"{self.tensor['sum', w.slot]}_sum", "0.0f")

    def _keep(self, slot: int, name: str, at: str | None) -> None:
        """A value of the channel in a variable, a whole value where it lies."""
        if self.shapes.is_whole(slot):
            self.values.row[slot] = self.text.address(name, slot, at)
        else:
            self.values.channel[slot] = self.text.define(f"c_{slot}", self.text.element(name, slot, at))

    def _begin_carry(self, g: Given, name: str, whole: bool) -> None:
        if g.next is None or g.next in [other.slot for other in self.given]:
            raise Unsupported
        unique = self.text.names.unique
        if not whole:
            carry = unique(f"carry_{g.slot}")
            self.values.channel[g.slot] = self.text.variable(carry, self.text.element(name, g.slot, None))
            return
        now, step = unique(f"now_{g.slot}"), unique(f"now_{g.slot}_step")
        self.text.line(f"float* {now} = {self._first_row(name, g.slot, None)};", f"int64_t {step} = {name}_row;")
        self.values.row[g.slot] = f"{now} + row * {step}"

    def _first_row(self, name: str, slot: int, at: str | None) -> str:
        return self.text.address(name, slot, at).rsplit(" + row", 1)[0]

    # --------------------------------------------------------------------------------------------------------------- a step

    def _step(self) -> None:
        self.text.begin_step()
        for g in self.given:
            if g.kind == "series":
                self._keep(g.slot, self.tensor["init", g.slot], "t")
            elif g.kind == "before":
                self._before(g)
        for i, unit in enumerate(self.program.units):
            if isinstance(unit, Region):
                self._region(unit, self.program.units[i + 1 :])
            else:
                self._call(unit)
        self._results_of_step()
        self._next_carries()
        self.text.ask_ahead(self._read_next)

    def _read_next(self) -> Iterator[str]:
        """The rows in memory that the next step, or the first of the next channel, reads."""
        for g in self.given:
            if g.kind in ("series", "before") and self.shapes.is_whole(g.slot):
                name, at = {"series": ("init", "t_ahead"), "before": ("after", "(t_ahead ? t_ahead - 1 : 0)")}[g.kind]
                yield self.text.address(self.tensor[name, g.slot], g.slot, at, "channel_ahead")

    def _before(self, g: Given) -> None:
        """``t == 0 ? initial state : state after step t - 1``"""
        init, after = self.tensor["init", g.slot], self.tensor["after", g.slot]
        if not self.shapes.is_whole(g.slot):
            raise Unsupported
        name, step = self.text.names.unique(f"state_{g.slot}"), self.text.names.unique(f"state_{g.slot}_step")
        first, later = self._first_row(init, g.slot, None), self._first_row(after, g.slot, "(t - 1)")
        self.text.line(f"float* const {name} = t == 0 ? {first} : {later};")
        self.text.line(f"const int64_t {step} = t == 0 ? {init}_row : {after}_row;")
        self.values.row[g.slot] = f"{name} + row * {step}"

    # -------------------------------------------------------------------------------------------------------------- regions

    def _region(self, unit: Region, rest: Sequence[Region | Call]) -> None:
        if self.shapes.of_region(unit):
            self._region_of_rows(unit, rest)
        else:
            self._region_of_channel(unit)

    def _region_of_channel(self, unit: Region) -> None:
        graph, emitter = unit.kernel.step.graph, Emitter(self.text.names, helpers=self.text.helpers, is_scalar=True)
        placeholders, nodes = _parts(graph)
        emitter.values = {
            p: Text(self.values.of_channel(s), torch.float32) for p, s in zip(placeholders, unit.inputs, strict=True)
        }
        made = dict(zip(unit.outputs, results(graph), strict=True))
        statements = emitter.statements(nodes, list(made.values()))  # type: ignore[arg-type]
        values = {f"c_{slot}": emitter.value(node, torch.float32) for slot, node in made.items()}
        names = self.text.results(statements, values)
        self.values.channel |= {slot: names[f"c_{slot}"] for slot in made}

    def _region_of_rows(self, unit: Region, rest: Sequence[Region | Call]) -> None:
        """A loop over the channel's values. It also stores what was not stored where it was made, and adds up what the norms
        behind it sum."""
        emitter = Emitter(self.text.names.copy(), helpers=self.text.helpers, is_scalar=False)
        for slot in unit.outputs:
            self._place(slot)
        series = self._series_stored_by(unit)
        sums, read = self._sums_behind(unit, rest)
        self.text.declare(sums)
        also = [self.values.row[o] for o in unit.outputs] + list(series.values())
        with self.text.lanes(read, sums, also, self._streamed(unit, series, rest)) as lane:
            here = self._compute(unit, emitter, read, lane)
            stores = [*((slot, self.values.row[slot]) for slot in unit.outputs), *series.items()]
            self.text.line(*(f"{lane.targets[address]} = {here[slot]};" for slot, address in stores))
            self.text.line(*(f"{s.partial} += {s.of(here)};" for s in sums))
        for slot, address in series.items():
            self.stored.add(slot)
            if slot in self.values.made:
                self.values.row[slot] = address
                del self.values.made[slot]

    def _compute(self, unit: Region, emitter: Emitter, read: Sequence[int], lane: Lane) -> dict[int, str]:
        """The statements of a region in a lane; the texts of its inputs and outputs, by slot."""
        graph, here = unit.kernel.step.graph, dict(lane.values)
        placeholders, nodes = _parts(graph)
        for placeholder, slot in zip(placeholders, unit.inputs, strict=True):
            if slot in read:
                name = here[slot] = emitter.names.unique(placeholder.meta.get("user_name") or placeholder.name)
                self.text.line(f"const float {name} = {self.values.load(slot, lane.values)};")
                emitter.values[placeholder] = Text(name, torch.float32)
            else:
                emitter.values[placeholder] = Text(self.values.of_channel(slot), torch.float32)
        made = results(graph)
        self.text.line(*emitter.statements(nodes, made))  # type: ignore[arg-type]
        return here | {slot: emitter.value(node, torch.float32) for slot, node in zip(unit.outputs, made, strict=True)}

    def _series_stored_by(self, unit: Region) -> dict[int, str]:
        """Inputs that were not stored where they were made, and states, which stay in the cache for the next step."""
        stored = [s for s in unit.inputs if s in self.values.made] + [s for s in unit.outputs if self._is_next(s)]
        return {s: self.text.address(self.tensor["series", s], s, "t") for s in stored if s in self.series}

    def _sums_behind(self, unit: Region, rest: Sequence[Region | Call]) -> tuple[list[Sum], list[int]]:
        """What the region's loop adds up for the calls behind it, and the slots of whole values that it reads."""
        calls = [call for call in rest if isinstance(call, Call)]
        sums = [s for call in calls for s in self._sums(call, unit)]
        read = [s for s in unit.inputs if s in self.values.row or s in self.values.made]
        for call in calls:
            if call.output in self.summed:
                read += [s for s in summed(call) if s in self.values.row and s not in unit.outputs]
        return sums, list(dict.fromkeys(read))

    def _sums(self, call: Call, region: Region) -> list[Sum]:
        """Sums over the channel that `call` needs, where `region` makes what is summed."""
        slots = summed(call)
        if not self.text.sums_in_loop() or not any(s in region.outputs for s in slots):
            return []
        if not all(s in region.outputs or s in self.values.row for s in slots):
            return []
        sums = first_pass(call, self.text)
        self.summed[call.output] = [s.name for s in sums]
        return sums

    def _streamed(self, unit: Region, series: dict[int, str], rest: Sequence[Region | Call]) -> list[str]:
        """Rows that nobody reads again soon."""
        streamed = [self.values.row[o] for o in unit.outputs if o in self.series and not self._is_read_again(o, rest)]
        return streamed + [a for s, a in series.items() if self._is_next(s) or not self._is_read_again(s, rest)]

    def _is_read_again(self, slot: int, rest: Sequence[Region | Call]) -> bool:
        """Soon, by a unit of this step or as a state of the next."""
        read = [i for u in rest for i in slots_read(u)]
        return slot in read or self._is_next(slot)

    def _is_next(self, slot: int) -> bool:
        """A state, that the next step reads."""
        return slot in [g.next for g in self.given if g.kind == "carry"]

    def _place(self, slot: int) -> None:
        """Where a whole value goes: into its series, if it is wanted, or into a buffer."""
        if self._is_next(slot):
            self.values.row[slot] = self._two_buffers() + IN_BUFFER
        elif slot in self.series:
            self.values.row[slot] = self.text.address(self.tensor["series", slot], slot, "t")
        else:
            self.values.row[slot] = self.text.buffer() + IN_BUFFER

    def _two_buffers(self) -> str:
        """A state is read while the next one is written."""
        even, odd, here = self.text.buffer(), self.text.buffer(), self.text.names.unique("next_state")
        self.text.line(f"float* const {here} = t % 2 ? {odd} : {even};")
        return here

    # ---------------------------------------------------------------------------------------------------------------- calls

    def _call(self, unit: Call) -> None:
        if unit.target is getitem:
            self._part(unit)
        elif unit.target in RESHAPES:
            (slot, *_) = unit.args
            if not isinstance(slot, Slot) or not self.shapes.is_channel(unit.output):
                raise Unsupported
            self.values.channel[unit.output] = self.values.of_channel(slot.index)
        elif is_norm(unit):
            self.parts[unit.output] = norm(unit, self.text, self.summed.get(unit.output))
        else:
            raise Unsupported

    def _part(self, unit: Call) -> None:
        source, i = unit.args
        parts = self.parts.get(source.index, ()) if isinstance(source, Slot) else ()
        if not isinstance(i, int) or i >= len(parts):
            raise Unsupported
        part = parts[i]
        if isinstance(part, str):
            self.values.channel[unit.output] = part
        else:
            self.values.made[unit.output] = part

    # ------------------------------------------------------------------------------------------------------ after the units

    def _results_of_step(self) -> None:
        for w in self.wanted:
            if w.kind == "sum":
                self.text.each_channel(f"{self._sum_over_steps(w.slot)} += {self.values.of_channel(w.slot)};")
            elif w.kind == "series" and w.slot not in self.stored:
                self._store(w.slot, self.tensor["series", w.slot], "t")

    def _sum_over_steps(self, slot: int) -> str:
        return f"{self.tensor['sum', slot]}_sum{self.text.index}"

    def _store(self, slot: int, name: str, at: str | None) -> None:
        """A value that is not there yet goes to where it is wanted."""
        address = self.text.address(name, slot, at)
        if self.values.row.get(slot) == address:
            return
        if not self.shapes.is_whole(slot):
            self.text.store_channel(self.text.element(name, slot, at), self.values.of_channel(slot))
            return
        if slot not in self.values.row and slot not in self.values.made:
            raise Unsupported
        with self.text.lanes([slot], also=[address]) as lane:
            self.text.line(f"{lane.targets[address]} = {self.values.load(slot, lane.values)};")
        self.values.row[slot] = address
        self.values.made.pop(slot, None)

    def _next_carries(self) -> None:
        for g in self.given:
            if g.kind != "carry":
                continue
            assert g.next is not None
            if not self.shapes.is_whole(g.slot):
                self.text.each_channel(f"{self.values.channel[g.slot]} = {self.values.of_channel(g.next)};")
                continue
            if g.next not in self.values.row or not self.shapes.is_whole(g.next):
                raise Unsupported
            pointer, step = self.values.row[g.next].rsplit(" + row * ", 1)
            now, now_step = self.values.row[g.slot].rsplit(" + row * ", 1)
            self.text.line(f"{now} = {pointer};", f"{now_step} = {step};")

    def _end(self) -> None:
        for w in self.wanted:
            name = self.tensor[w.kind, w.slot]
            if w.kind == "sum":
                self.text.store_channel(self.text.element(name, w.slot, None), self._sum_over_steps(w.slot))
            elif w.kind == "final":
                self._store(w.slot, name, None)


def _parts(graph: fx.Graph) -> tuple[list[fx.Node], list[fx.Node]]:
    """Placeholders and ops."""
    return [n for n in graph.nodes if n.op == "placeholder"], [n for n in graph.nodes if n.op == "call_function"]

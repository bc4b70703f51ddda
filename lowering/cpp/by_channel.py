"""A step whose calls only look along one channel -> C++ in which a thread owns whole channels and runs all steps.

    for t: h = charge(v, x[t]); y = batch_norm(h); s = H(y - 1); v = reset(y, s)          T launches of each, through memory
    ->  for channel: for t: h = …, mean, invstd of h; s[t], v = … h*scale + shift …        one launch; h and v stay in cache

for values ``[N, C, *space]``, and per-channel values ``[C]``. Statistics are summed in fp64, as eager's batch norm on CPU does,
so that they round to its bits. What a batch norm gives is not stored: each reader computes it from ``h`` and two numbers of the
channel.

Where the dims of space lie together in memory, a row is ``[*space]`` of one channel, and there are ``N`` of them. Where channels
do (``[N, C]``, channels-last), a row is `BLOCK` channels, a value of a channel is an array of that many, and there are
``N*prod(space)`` rows; if they are many, all threads share the rows of a block and add up their sums. Eager's batch norm sums
such values in fp32, one slice of the rows a thread, and the slices in fp64: so does the kernel where eager's values lie so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import getitem
from typing import Any

import torch
from torch import fx

from snn_compile.ir.stepped import Call, Program, Region, Slot
from snn_compile.lowering.channel_program import RESHAPES, Given, Shapes, Unsupported, Wanted, slots_read, summed
from snn_compile.lowering.channels_last import is_channels_last
from snn_compile.lowering.cpp.emit import Emitter, Text, results
from snn_compile.lowering.cpp.names import Names, comment, words
from snn_compile.lowering.cpp.prelude import prelude

aten = torch.ops.aten


#: How the address of a row of a buffer ends.
_IN_BUFFER = " + row * inner"
#: Rows shorter than this are not summed while they are made: their buffers are, as one run.
_SHORT = 128
#: What a kernel calls its own.
_NAMES = words(
    "i row begin end slice first last lanes width count slices chunk until shared sets sums team run channel channels inner "
    "tensors strides distance ahead wraps t_ahead channel_ahead"
)
#: A step of a channel of at most so many values leaves room in the second-level cache for what the next one reads.
_AHEAD = 1 << 14
#: Channels of a row where channels lie together: a cache line.
BLOCK = 16


@dataclass(frozen=True)
class Sum:
    """A variable in fp64 and what it adds up, from the values by slot; `partial`: one in fp32 for the sum of a row, or of a slice
    of rows."""

    name: str
    of: Callable[[dict[int, str]], str]
    partial: str


def array_of(name: str) -> str:
    """Of a value of a channel of a row, those of all of its channels."""
    return name.removesuffix("[i]")


@dataclass(frozen=True)
class Lane:
    """Texts of the elements of the current lane: of the values by slot, and of rows that are written by address."""

    values: dict[int, str]
    targets: dict[str, str]


@dataclass(frozen=True)
class ChannelSource:
    """The text of a kernel ``entry(tensors, strides, steps, channels, rows, inner, streaming, threads, scratch)``.

    `strides` has three numbers a tensor - step, row, channel - in elements; a tensor of channels has two, and 0.
    """

    entry: str
    text: str
    #: arrays of ``rows*inner`` floats that a thread needs
    buffers: int
    #: of a whole value, ``[N, C, *space]``
    shape: torch.Size
    #: channels lie together in memory: the parameters `inner` and `streaming` are the number of slices of the rows, and whether
    #: threads share the rows of a block
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
    return _Writer(name, program, values, given, wanted, reverse, is_channels_last).source()


@dataclass
class _Writer:
    name: str
    program: Program
    values: Sequence[torch.Tensor]
    given: Sequence[Given]
    wanted: Sequence[Wanted]
    reverse: bool
    is_channels_last: bool = False
    lines: list[str] = field(default_factory=list)
    depth: int = 1
    helpers: set[str] = field(default_factory=set)
    names: Names = field(default_factory=Names)
    #: slot of a whole value -> its address in the current row, as text
    row: dict[int, str] = field(default_factory=dict)
    #: slot of a whole value that is not stored -> ``(slots it is made from, text from their values)``
    made: dict[int, tuple[tuple[int, ...], Callable[..., str]]] = field(default_factory=dict)
    #: slot of a channel's value -> its name
    channel: dict[int, str] = field(default_factory=dict)
    buffers: list[str] = field(default_factory=list)
    #: slot of a call with several results -> each as a name, or as in `made`
    parts: dict[int, tuple[Any, ...]] = field(default_factory=dict)
    #: slot of a call -> the sums it needs that the loop of a region has made
    summed: dict[int, list[str]] = field(default_factory=dict)
    #: slots of whole values that the loop of a region has stored in their series
    stored: set[int] = field(default_factory=set)
    #: the most sums added up at once
    most_sums: int = 0
    #: where the body of the step's last loop over rows begins
    last_rows: int | None = None

    def __post_init__(self) -> None:
        self.shapes = Shapes(self.values)
        self.shape = self.shapes.whole
        if len(self.shape) == 2 and not self.is_channels_last:
            raise Unsupported
        self.series = {w.slot for w in self.wanted if w.kind == "series"}
        for name in sorted(_NAMES):
            self.names.unique(name)

    # -------------------------------------------------------------------------------------------------------------- text

    def line(self, *lines: str) -> None:
        self.lines += [f"{'  ' * self.depth}{line}" if not line.startswith("#") else line for line in lines]

    @contextmanager
    def braces(self, header: str) -> Iterator[None]:
        self.line(f"{header} {{")
        self.depth += 1
        yield
        self.depth -= 1
        self.line("}")

    def each_channel(self, *statements: str) -> None:
        """Statements about values of a channel: for every channel of the row, where it has several."""
        if not self.is_channels_last:
            self.line(*statements)
        elif len(statements) == 1:
            self.line(f"for (int64_t i = 0; i < lanes; ++i) {statements[0]}")
        else:
            with self.braces("for (int64_t i = 0; i < lanes; ++i)"):
                self.line(*statements)

    def define(self, name: str, value: str) -> str:
        """A value of the channel, and what it is called from now on."""
        return self.variable(self.names.unique(name), value, "const ")

    def variable(self, name: str, value: str, const: str = "") -> str:
        """As `define`, of what changes, by a name of its own."""
        if not self.is_channels_last:
            self.line(f"{const}float {name} = {value};")
            return name
        self.line(f"float {name}[inner];")
        self.each_channel(f"{name}[i] = {value};")
        return f"{name}[i]"

    def store_channel(self, target: str, value: str) -> None:
        """Of threads that share a block, one writes."""
        if self.is_channels_last:
            self.line("if (team.member == 0)")
        self.each_channel(f"{target} = {value};")

    def declare(self, sums: Sequence[Sum]) -> None:
        for s in sums:
            self.line(f"double {array_of(s.name)}[inner] = {{}};" if self.is_channels_last else f"double {s.name} = 0.0;")

    @property
    def count(self) -> str:
        """How many values a channel has."""
        return "rows" if self.is_channels_last else "(rows * inner)"

    @contextmanager
    def lanes(
        self, slots: Sequence[int], sums: Sequence[Sum] = (), also: Sequence[str] = (), streamed: Sequence[str] = ()
    ) -> Iterator[Lane]:
        """The loops over a channel's values: row by row, or as one run where all that is touched lies in buffers.

        `sums` are added up in it; `also`: rows that are written; `streamed`: those of them that may go past the caches.
        """
        names = self.names.copy()
        stored = dict.fromkeys(s for slot in slots for s in self._stored(slot))
        read = dict.fromkeys(self.row[s] for s in stored)
        pointers = {a: names.unique(f"{a.split()[0]}_at") for a in (*read, *(a for a in also if a not in read))}
        is_one_run = not self.is_channels_last and all(address.endswith(_IN_BUFFER) for address in pointers)
        streamed = () if self.is_channels_last else streamed  # (a row is too short)
        lanes = "lanes" if self.is_channels_last else "inner"
        of_row = [s for s in sums if s.partial != s.name and not self.is_channels_last]
        with contextlib.nullcontext() if is_one_run else self._rows(sums):
            if is_one_run:
                pointers = {address: address.removesuffix(_IN_BUFFER) for address in pointers}
            else:
                self._point_to_row(pointers, read)
            direct = dict(pointers)
            for address in streamed:
                pointers[address] = names.unique(f"{address.split()[0]}_to")
                self.line(f"float* const {pointers[address]} = streaming ? {self._buffer()} : {direct[address]};")
            self.line(*(f"float {s.partial} = 0.0f;" for s in of_row))
            reduced = ", ".join(s.partial for s in sums if not self.is_channels_last)
            self.line(f"#pragma omp simd reduction(+ : {reduced})" if reduced else "#pragma omp simd")
            with self.braces(f"for (int64_t i = 0; i < {'rows * inner' if is_one_run else lanes}; ++i)"):
                yield Lane({s: f"{pointers[self.row[s]]}[i]" for s in stored}, {a: f"{p}[i]" for a, p in pointers.items()})
            self.line(*(f"{s.name} += {s.partial};" for s in of_row))
            for address in streamed:
                self.helpers.add("stream")
                self.line(f"if (streaming) stream({direct[address]}, {pointers[address]}, inner * sizeof(float));")

    @contextmanager
    def _rows(self, sums: Sequence[Sum]) -> Iterator[None]:
        """The loop over rows. Where a row has several channels, what threads and slices of rows add up is summed behind it."""
        if not self.is_channels_last:
            with self.braces("for (int64_t row = 0; row < rows; ++row)"):
                self.last_rows = len(self.lines)
                yield
            return
        of_slice = [s for s in sums if s.partial != s.name]
        if not of_slice:
            with self.braces("for (int64_t row = first; row < last; ++row)"):
                yield
        else:
            with self.braces("for (int64_t slice = begin; slice < end; ++slice)"):
                self.line(*(f"float {array_of(s.partial)}[inner] = {{}};" for s in of_slice))
                self.line("const int64_t until = min(rows, (slice + 1) * chunk);")
                with self.braces("for (int64_t row = slice * chunk; row < until; ++row)"):
                    yield
                self.each_channel(*(f"{s.name} += {s.partial};" for s in of_slice))
        if sums:
            self.most_sums = max(self.most_sums, len(sums))
            self.line(f"team.add({', '.join(array_of(s.name) for s in sums)});")

    def _point_to_row(self, pointers: dict[str, str], read: Iterable[str]) -> None:
        """A pointer into every row. A channel's rows lie far apart in a tensor: the next but one is asked for now, or the step
        before has asked for them (`_ask_ahead`)."""
        for address, pointer in pointers.items():
            self.line(f"float* const {pointer} = {address};")
            if address in read and not address.endswith(_IN_BUFFER) and not self.is_channels_last:
                self.helpers.add("prefetch")
                self.line(f"if (!ahead) prefetch({pointer} + 2 * {address.rsplit(' * ', 1)[1]}, inner * sizeof(float));")

    def _stored(self, slot: int) -> list[int]:
        return [s for source in self.made[slot][0] for s in self._stored(source)] if slot in self.made else [slot]

    def _load(self, slot: int, texts: dict[int, str]) -> str:
        if slot not in self.made:
            return texts[slot]
        sources, make = self.made[slot]
        return make(*(self._load(s, texts) for s in sources))

    # ------------------------------------------------------------------------------------------------------------- shapes

    def is_whole(self, slot: int) -> bool:
        return self.shapes.is_whole(slot)

    def is_channel(self, slot: int) -> bool:
        return self.shapes.is_channel(slot)

    # ------------------------------------------------------------------------------------------------------------ the whole

    def source(self) -> ChannelSource:
        self._declare()
        body = self._body()
        together = self.is_channels_last
        layout = "int64_t slices, bool shared" if together else "int64_t inner, bool streaming"
        helpers = self.helpers | {"min"} | ({"team"} if together else set())
        text = "\n".join(
            [
                comment(f"{self.name}: all steps of a {'block of channels' if together else 'channel'} at a time"),
                "",
                *(["#include <omp.h>"] if together else []),
                "#include <cstdint>",
                prelude(helpers),
                f'extern "C" void {self.name}(',
                "    float* const* tensors, const int64_t* strides, int64_t steps, int64_t channels, int64_t rows,",
                f"    {layout}, int64_t threads, float* scratch) {{",
                *body,
                "}",
                "",
            ]
        )
        return ChannelSource(self.name, text, len(self.buffers), self.shape, together, self.most_sums)

    def _declare(self) -> None:
        """A pointer and strides for every tensor, in the order of `given` and `wanted`."""
        self.tensor: dict[tuple[str, int], str] = {}
        given = [(kind, g.slot, g.name) for g in self.given for kind in ("after", "init")[2 - g.tensors :]]
        wanted = [(w.kind, w.slot, "") for w in self.wanted]
        if len(set(wanted)) < len(wanted):
            raise Unsupported
        for i, (kind, slot, own) in enumerate(given + wanted):
            name = self.tensor[kind, slot] = self.names.unique(f"{own}_{kind}" if kind == "after" else own or f"result_{i}")
            self.line(f"float* const {name} = tensors[{i}];")
            parts = [f"{name}_{part} = strides[{3 * i + j}]" for j, part in enumerate(("step", "row", "channel"))]
            self.line(f"const int64_t {', '.join(parts)};")

    def _address(self, name: str, slot: int, at: str | None, channel: str = "channel") -> str:
        step = f" + {at} * {name}_step" if at else ""
        row = f" + row * {name}_row" if self.is_whole(slot) else ""
        return f"{name}{step} + {channel} * {name}_channel{row}"

    def _body(self) -> list[str]:
        head, self.lines = self.lines, []
        self.depth = 3
        if not self.is_channels_last:
            self.line(f"const bool ahead = rows * inner <= {_AHEAD};")
        self._begin()
        loop = "int64_t t = steps - 1; t >= 0; --t" if self.reverse else "int64_t t = 0; t < steps; ++t"
        with self.braces(f"for ({loop})"):
            self._step()
        self._end()
        inside, self.lines, self.depth = self.lines, head, 1
        if self.is_channels_last:
            self._threads_of_blocks(inside)
            return self.lines
        self.line("#pragma omp parallel for num_threads(threads) schedule(static, 1)")
        with self.braces("for (int64_t thread = 0; thread < threads; ++thread)"):
            for i, name in enumerate(self.buffers):
                self.line(f"float* {name} = scratch + (thread * {len(self.buffers)} + {i}) * rows * inner;")
            self.line("const int64_t end = channels * (thread + 1) / threads;")
            with self.braces("for (int64_t channel = channels * thread / threads; channel < end; ++channel)"):
                self.lines += inside
        return self.lines

    def _threads_of_blocks(self, inside: Sequence[str]) -> None:
        """Threads share the rows of every block, or they share the blocks."""
        self.line(f"constexpr int64_t inner = {BLOCK};")
        self.line("#pragma omp parallel num_threads(threads)")
        with self.braces(""):
            self.line("const int64_t thread = omp_get_thread_num(), count = omp_get_num_threads();")
            self.line("const int64_t begin = shared ? slices * thread / count : 0;")
            self.line("const int64_t end = shared ? slices * (thread + 1) / count : slices;")
            self.line("const int64_t chunk = (rows + slices - 1) / slices;")
            self.line("const int64_t first = min(rows, begin * chunk), last = min(rows, end * chunk);")
            self.line("const int64_t sets = shared ? 1 : threads;")
            self.line(f"double* const sums = reinterpret_cast<double*>(scratch + sets * {len(self.buffers)} * rows * inner);")
            half = f"threads * {self.most_sums} * inner"
            self.line(f"Team team{{shared ? thread : 0, shared ? count : 1, sums, {half}}};")
            for i, name in enumerate(self.buffers):
                self.line(f"float* {name} = scratch + ((shared ? 0 : thread) * {len(self.buffers)} + {i}) * rows * inner;")
            with self.braces("const auto run = [&](const int64_t channel, const auto width)"):
                self.line("const int64_t lanes = width;")
                self.lines += inside
            self.lines[-1] += ";"
            self.line("const int64_t blocks = (channels + inner - 1) / inner;")
            self.line("const int64_t until = shared ? blocks : blocks * (thread + 1) / count;")
            with self.braces("for (int64_t block = shared ? 0 : blocks * thread / count; block < until; ++block)"):
                self.line("const int64_t channel = block * inner;")
                self.line("if (channels - channel < inner) run(channel, channels - channel);")
                self.line("else run(channel, Constant<inner>());")

    def _buffer(self) -> str:
        self.buffers.append(self.names.unique(f"buffer_{len(self.buffers)}"))
        return self.buffers[-1]

    # ----------------------------------------------------------------------------------------------------- before the steps

    def _begin(self) -> None:
        for g in self.given:
            if g.kind == "zero":
                self.channel[g.slot] = "0.0f"
                continue
            whole = self.is_whole(g.slot)
            if not whole and not self.is_channel(g.slot) and not (g.kind == "const" and self.shapes.tensor(g.slot).dim() == 0):
                raise Unsupported
            name = self.tensor["init", g.slot]
            if g.kind == "const":
                self._keep(g.slot, name, None)
            elif g.kind == "carry":
                self._begin_carry(g, name, whole)
        for w in self.wanted:
            if w.kind == "sum":
                if not self.is_channel(w.slot):
                    raise Unsupported
                self.variable(f"{self.tensor['sum', w.slot]}_sum", "0.0f")

    def _keep(self, slot: int, name: str, at: str | None) -> None:
        """A value of the channel in a variable, a whole value where it lies."""
        if self.is_whole(slot):
            self.row[slot] = self._address(name, slot, at)
        else:
            self.channel[slot] = self.define(f"c_{slot}", self._element(name, slot, at))

    def _element(self, name: str, slot: int, at: str | None) -> str:
        """Where a channel's value lies in a tensor."""
        return f"*({self._address(name, slot, at)}{f' + i * {name}_channel' if self.is_channels_last else ''})"

    def _begin_carry(self, g: Given, name: str, whole: bool) -> None:
        if g.next is None or g.next in [other.slot for other in self.given]:
            raise Unsupported
        if not whole:
            carry = self.names.unique(f"carry_{g.slot}")
            self.channel[g.slot] = self.variable(carry, self._element(name, g.slot, None))
            return
        now, step = self.names.unique(f"now_{g.slot}"), self.names.unique(f"now_{g.slot}_step")
        self.line(f"float* {now} = {self._address(name, g.slot, None).rsplit(' + row', 1)[0]};")
        self.line(f"int64_t {step} = {name}_row;")
        self.row[g.slot] = f"{now} + row * {step}"

    # --------------------------------------------------------------------------------------------------------------- a step

    def _step(self) -> None:
        if not self.is_channels_last:
            wraps, first, later = ("t == 0", "steps - 1", "t - 1") if self.reverse else ("t + 1 == steps", "0", "t + 1")
            self.line(f"const bool wraps = {wraps};")
            self.line(f"const int64_t t_ahead = wraps ? {first} : {later}, channel_ahead = min(channel + wraps, channels - 1);")
        self.last_rows = None
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
        self._ask_ahead()

    def _ask_ahead(self) -> None:
        """While the last loop of a step computes, memory is idle: it asks for the rows of the next step, or next channel."""
        if self.last_rows is None:
            return
        asked = []
        for g in self.given:
            if g.kind in ("series", "before") and self.is_whole(g.slot):
                name, at = {"series": ("init", "t_ahead"), "before": ("after", "(t_ahead ? t_ahead - 1 : 0)")}[g.kind]
                address = self._address(self.tensor[name, g.slot], g.slot, at, "channel_ahead")
                asked.append(f"if (ahead) prefetch({address}, inner * sizeof(float));")
                self.helpers.add("prefetch")
        self.lines[self.last_rows : self.last_rows] = [f"{'  ' * (self.depth + 1)}{line}" for line in asked]

    def _before(self, g: Given) -> None:
        """``t == 0 ? initial state : state after step t - 1``"""
        init, after = self.tensor["init", g.slot], self.tensor["after", g.slot]
        if not self.is_whole(g.slot):
            raise Unsupported
        name, step = self.names.unique(f"state_{g.slot}"), self.names.unique(f"state_{g.slot}_step")
        first, later = (self._address(n, g.slot, at).rsplit(" + row", 1)[0] for n, at in ((init, None), (after, "(t - 1)")))
        self.line(f"float* const {name} = t == 0 ? {first} : {later};")
        self.line(f"const int64_t {step} = t == 0 ? {init}_row : {after}_row;")
        self.row[g.slot] = f"{name} + row * {step}"

    def _place(self, slot: int) -> None:
        """Where a whole value goes: into its series, if it is wanted, or into a buffer."""
        if self._is_next(slot):
            self.row[slot] = self._two_buffers() + _IN_BUFFER
        elif slot in self.series:
            self.row[slot] = self._address(self.tensor["series", slot], slot, "t")
        else:
            self.row[slot] = self._buffer() + _IN_BUFFER

    def _is_next(self, slot: int) -> bool:
        """A state, that the next step reads."""
        return slot in [g.next for g in self.given if g.kind == "carry"]

    def _two_buffers(self) -> str:
        """A state is read while the next one is written."""
        even, odd, here = self._buffer(), self._buffer(), self.names.unique("next_state")
        self.line(f"float* const {here} = t % 2 ? {odd} : {even};")
        return here

    def _region(self, unit: Region, rest: Sequence[Region | Call]) -> None:
        graph = unit.kernel.step.graph
        placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        whole = self.shapes.of_region(unit)
        nodes, made = [n for n in graph.nodes if n.op == "call_function"], results(graph)
        emitter = Emitter(self.names.copy() if whole else self.names, helpers=self.helpers, is_scalar=not whole)
        operands = dict(zip(placeholders, unit.inputs, strict=True))
        if not whole:
            emitter.values = {p: Text(self._of_channel(s), torch.float32) for p, s in operands.items()}
            self._region_of_channel(emitter.statements(nodes, made), unit, emitter, made)  # type: ignore[arg-type]
            return
        for slot in unit.outputs:
            self._place(slot)
        read = [s for s in unit.inputs if s in self.row or s in self.made]
        # what was not stored where it was made, and states, which stay in the cache for the next step
        given = [s for s in read if s in self.made] + [s for s in unit.outputs if self._is_next(s)]
        series = {s: self._address(self.tensor["series", s], s, "t") for s in given if s in self.series}
        calls = [call for call in rest if isinstance(call, Call)]
        sums = [s for call in calls for s in self._sums(call, unit)]
        read += [
            s for call in calls if call.output in self.summed for s in summed(call) if s in self.row and s not in unit.outputs
        ]
        read = list(dict.fromkeys(read))
        self.declare(sums)
        streamed = [self.row[o] for o in unit.outputs if o in self.series and not self._is_read_again(o, rest)]
        streamed += [address for s, address in series.items() if self._is_next(s) or not self._is_read_again(s, rest)]
        with self.lanes(read, sums, [self.row[o] for o in unit.outputs] + list(series.values()), streamed) as lane:
            here = dict(lane.values)
            for placeholder, slot in operands.items():
                if slot in read:
                    name = here[slot] = emitter.names.unique(placeholder.meta.get("user_name") or placeholder.name)
                    self.line(f"const float {name} = {self._load(slot, lane.values)};")
                    emitter.values[placeholder] = Text(name, torch.float32)
                else:
                    emitter.values[placeholder] = Text(self._of_channel(slot), torch.float32)
            self.line(*emitter.statements(nodes, made))  # type: ignore[arg-type]
            here |= {slot: emitter.value(node, torch.float32) for slot, node in zip(unit.outputs, made, strict=True)}
            stores = [*((slot, self.row[slot]) for slot in unit.outputs), *series.items()]
            self.line(*(f"{lane.targets[address]} = {here[slot]};" for slot, address in stores))
            self.line(*(f"{s.partial} += {s.of(here)};" for s in sums))
        for slot, address in series.items():
            self.stored.add(slot)
            if slot in self.made:
                self.row[slot] = address
                del self.made[slot]

    def _region_of_channel(self, statements: list[str], unit: Region, emitter: Emitter, made: Sequence[fx.Node]) -> None:
        if not self.is_channels_last:
            self.line(*statements)
            for slot, node in zip(unit.outputs, made, strict=True):
                self.channel[slot] = self.define(f"c_{slot}", emitter.value(node, torch.float32))
            return
        names = [self.names.unique(f"c_{slot}") for slot in unit.outputs]
        self.line(*(f"float {name}[inner];" for name in names))
        stores = [f"{name}[i] = {emitter.value(node, torch.float32)};" for name, node in zip(names, made, strict=True)]
        self.each_channel(*statements, *stores)
        self.channel |= {slot: f"{name}[i]" for slot, name in zip(unit.outputs, names, strict=True)}

    def _is_read_again(self, slot: int, rest: Sequence[Region | Call]) -> bool:
        """Soon, by a unit of this step or as a state of the next."""
        read = [i for u in rest for i in slots_read(u)]
        return slot in read or self._is_next(slot)

    def _of_channel(self, slot: int) -> str:
        if slot not in self.channel:
            raise Unsupported
        return self.channel[slot]

    # ---------------------------------------------------------------------------------------------------------------- calls

    def _call(self, unit: Call) -> None:
        if unit.target is getitem:
            self._part(unit)
        elif unit.target in RESHAPES:
            (slot, *_) = unit.args
            if not isinstance(slot, Slot) or not self.is_channel(unit.output):
                raise Unsupported
            self.channel[unit.output] = self._of_channel(slot.index)
        elif unit.target is aten.native_batch_norm.default:
            self._batch_norm(unit)
        elif unit.target is aten.native_batch_norm_backward.default:
            self._batch_norm_backward(unit)
        else:
            raise Unsupported

    def _part(self, unit: Call) -> None:
        source, i = unit.args
        parts = self.parts.get(source.index, ()) if isinstance(source, Slot) else ()
        if not isinstance(i, int) or i >= len(parts):
            raise Unsupported
        part = parts[i]
        if isinstance(part, str):
            self.channel[unit.output] = part
        else:
            self.made[unit.output] = part

    def _sums(self, call: Call, region: Region) -> list[Sum]:
        """Sums over the channel that `call` needs, where `region` makes what is summed: added up in its loop."""
        slots = summed(call)
        if self.shape[2:].numel() < _SHORT and not self.is_channels_last:
            return []
        if not any(s in region.outputs for s in slots) or not all(s in region.outputs or s in self.row for s in slots):
            return []
        sums = self._first_pass(call)
        self.summed[call.output] = [s.name for s in sums]
        return sums

    def _first_pass(self, call: Call) -> list[Sum]:
        if call.target is aten.native_batch_norm.default:
            (h,) = summed(call)
            return [self._sum(f"total_{call.output}", lambda texts: texts[h], in_fp64=not self._sums_slices(h))]
        g, h = summed(call)
        mean = self._of_channel(call.args[5].index)  # type: ignore[union-attr, attr-defined]
        # (gradients are equal to rounding)
        return [
            self._sum(f"total_{call.output}", lambda texts: texts[g], in_fp64=self.is_channels_last),
            self._sum(
                f"product_{call.output}", lambda texts: f"{texts[g]} * ({texts[h]} - {mean})", in_fp64=self.is_channels_last
            ),
        ]

    def _sums_slices(self, slot: int) -> bool:
        """As eager's batch norm does with a value whose channels lie together."""
        return self.is_channels_last and is_channels_last(self.shapes.tensor(slot))

    def _sum(self, name: str, of: Callable[[dict[int, str]], str], in_fp64: bool) -> Sum:
        """`in_fp64`, or a row, or a slice of rows, in fp32."""
        name = self.names.unique(name)
        if self.is_channels_last:
            return Sum(f"{name}[i]", of, f"{name if in_fp64 else self.names.unique(f'slice_{name}')}[i]")
        return Sum(name, of, name if in_fp64 else self.names.unique(f"row_{name}"))

    def _totals(self, unit: Call, slots: Sequence[int]) -> list[str]:
        """The names of the sums of the first pass; its loop, where no region has run it."""
        if unit.output in self.summed:
            return self.summed[unit.output]
        if any(s not in self.row and s not in self.made for s in slots):
            raise Unsupported
        sums = self._first_pass(unit)
        self.declare(sums)
        with self.lanes(slots, sums) as lane:
            here = {s: self._load(s, lane.values) for s in slots}
            self.line(*(f"{s.partial} += {s.of(here)};" for s in sums))
        return [s.name for s in sums]

    def _batch_norm(self, unit: Call) -> None:
        """Mean and variance in two passes over the channel, summed in fp64 and rounded where eager rounds.

        (batch_norm_cpu_collect_stats_contiguous_impl, batch_norm_cpu_update_stats_template)
        """
        h, weight, bias, mean_, var_, training, _, eps = unit.args
        if training is not True or mean_ is not None or var_ is not None or not isinstance(h, Slot):
            raise Unsupported
        (total,) = self._totals(unit, [h.index])
        mean = self.define(f"mean_{unit.output}", f"float({total} / {self.count})")
        squares = self._sum(f"squares_{unit.output}", lambda _: "", in_fp64=not self._sums_slices(h.index))
        self.declare([squares])
        with self.lanes([h.index], [squares]) as lane:
            self.line(f"const float distance = {self._load(h.index, lane.values)} - {mean};")
            if self._sums_slices(h.index):
                self.line(f"{squares.partial} = __builtin_fmaf(distance, distance, {squares.partial});")
            else:
                self.line(f"{squares.partial} += distance * distance;")
        variance = f"float({squares.name}) / float({self.count})"
        invstd = self.define(f"invstd_{unit.output}", f"float(1.0 / __builtin_sqrt({variance} + {eps!r}))")
        factor = f"{invstd} * {self._of_channel(weight.index)}" if isinstance(weight, Slot) else invstd
        offset = self._of_channel(bias.index) if isinstance(bias, Slot) else "0.0f"
        scale = self.define(f"scale_{unit.output}", factor)
        shift = self.define(f"shift_{unit.output}", f"__builtin_fmaf(-{mean}, {scale}, {offset})")
        y = ((h.index,), lambda value: f"__builtin_fmaf({value}, {scale}, {shift})")
        self.parts[unit.output] = (y, mean, invstd)

    def _batch_norm_backward(self, unit: Call) -> None:
        """``grad_h = (g - E[g] - (h - mean)*E[g*(h - mean)]*invstd**2)*invstd*weight``, all means over the channel."""
        g, h, weight, mean_, var_, mean, invstd, training, *_ = unit.args
        if training is not True or mean_ is not None or var_ is not None:
            raise Unsupported
        if not (isinstance(g, Slot) and isinstance(h, Slot) and isinstance(mean, Slot) and isinstance(invstd, Slot)):
            raise Unsupported
        m, inv = self._of_channel(mean.index), self._of_channel(invstd.index)
        total, product = self._totals(unit, [g.index, h.index])
        center = self.define(f"center_{unit.output}", f"float({total} / {self.count})")
        slope = self.define(f"slope_{unit.output}", f"float({product} / {self.count}) * {inv} * {inv}")
        weighted = f"{inv}{f' * {self._of_channel(weight.index)}' if isinstance(weight, Slot) else ''}"
        factor = self.define(f"factor_{unit.output}", weighted)
        grad_h = ((g.index, h.index), lambda a, b: f"({a} - {center} - ({b} - {m}) * {slope}) * {factor}")
        grad_weight = self.define(f"grad_weight_{unit.output}", f"float({product}) * {inv}")
        grad_bias = self.define(f"grad_bias_{unit.output}", f"float({total})")
        self.parts[unit.output] = (grad_h, grad_weight, grad_bias)

    # ------------------------------------------------------------------------------------------------------ after the units

    def _results_of_step(self) -> None:
        for w in self.wanted:
            if w.kind == "sum":
                self.each_channel(f"{self._sum_over_steps(w.slot)} += {self._of_channel(w.slot)};")
            elif w.kind == "series" and w.slot not in self.stored:
                self._store(w.slot, self.tensor["series", w.slot], "t")

    def _sum_over_steps(self, slot: int) -> str:
        return f"{self.tensor['sum', slot]}_sum{'[i]' if self.is_channels_last else ''}"

    def _store(self, slot: int, name: str, at: str | None) -> None:
        """A value that is not there yet goes to where it is wanted."""
        address = self._address(name, slot, at)
        if self.row.get(slot) == address:
            return
        if not self.is_whole(slot):
            self.store_channel(self._element(name, slot, at), self._of_channel(slot))
            return
        if slot not in self.row and slot not in self.made:
            raise Unsupported
        with self.lanes([slot], also=[address]) as lane:
            self.line(f"{lane.targets[address]} = {self._load(slot, lane.values)};")
        self.row[slot] = address
        self.made.pop(slot, None)

    def _next_carries(self) -> None:
        carried = [g for g in self.given if g.kind == "carry"]
        for g in carried:
            assert g.next is not None
            if self.is_whole(g.slot):
                if g.next not in self.row or not self.is_whole(g.next):
                    raise Unsupported
                pointer, step = self.row[g.next].rsplit(" + row * ", 1)
                now, now_step = self.row[g.slot].rsplit(" + row * ", 1)
                self.line(f"{now} = {pointer};", f"{now_step} = {step};")
            else:
                self.each_channel(f"{self.channel[g.slot]} = {self._of_channel(g.next)};")

    def _end(self) -> None:
        for w in self.wanted:
            name = self.tensor[w.kind, w.slot]
            if w.kind == "sum":
                self.store_channel(self._element(name, w.slot, None), self._sum_over_steps(w.slot))
            elif w.kind == "final":
                self._store(w.slot, name, None)

"""What forward and backward kernels share: the block of lanes a thread works on, row pointers, loops, the signature."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from snn_compile.ir.recurrence import Recurrence
from snn_compile.lowering.cpp.literals import HALVES, HELD, held_bytes
from snn_compile.lowering.cpp.names import Names, comment, identifier
from snn_compile.lowering.cpp.prelude import is_bf16_alone, prelude
from snn_compile.lowering.cpp.tensors import TensorArgument, Tensors, tensors_of
from snn_compile.lowering.launch import Direction
from snn_compile.lowering.layout import Layout

#: Lanes between two prefetches: few enough that the fetches overlap with the arithmetic.
CHUNK = 256


@dataclass(frozen=True)
class Parameter:
    """One parameter of a kernel: its C++ declaration, and what the caller passes for it."""

    declaration: str
    kind: str
    tensor: int = -1
    dim: int = -1

    @property
    def name(self) -> str:
        return self.declaration.rsplit(" ", 1)[1]


@dataclass(frozen=True)
class KernelSource:
    """The text of a kernel and what a caller must know of it."""

    text: str
    entry: str
    parameters: tuple[Parameter, ...]
    #: most lanes of a block
    lanes: int
    #: bytes a lane and step, and bytes a lane and segment, of the scratch memory
    record_bytes: int
    checkpoint_bytes: int
    #: results stored row by row, contiguously
    streamed: tuple[int, ...]
    #: tensors whose time runs backwards
    reversed: tuple[int, ...]


@dataclass
class Writer:
    recurrence: Recurrence
    direction: Direction
    layout: Layout
    lines: list[str] = field(default_factory=list)
    helpers: set[str] = field(default_factory=lambda: {"min"})
    depth: int = 1
    lane_bytes: int = 0
    record_bytes: int = 0
    checkpoint_bytes: int = 0

    def __post_init__(self) -> None:
        self.stems = Names()
        self.tensors: Tensors = tensors_of(self.recurrence, self.direction, self.layout, self.stems)
        for tensor in self.tensors.all():
            if tensor.dtype in HALVES:
                self.helpers.add(HALVES[tensor.dtype])

    @property
    def entry(self) -> str:
        return f"{identifier(self.recurrence.name)}_{self.direction}"

    @property
    def has_rows(self) -> bool:
        return self.layout.ndim > 1

    # ---------------------------------------------------------------------------------------------------------- text

    def line(self, *lines: str) -> None:
        self.lines += [f"{'  ' * self.depth}{line}" if line and line[0] != "#" else line for line in lines]

    @contextmanager
    def braces(self, header: str) -> Iterator[None]:
        if header.startswith("else") and self.lines[-1].strip() == "}":
            header = f"{self.lines.pop().strip()} {header}"
        self.line(f"{header} {{")
        self.depth += 1
        yield
        self.depth -= 1
        self.line("}")

    def array(self, name: str, dtype: torch.dtype, c_type: str | None = None) -> str:
        """A value a lane that a block keeps between steps."""
        self.lane_bytes += held_bytes(dtype)
        self.line(f"alignas(64) {c_type or HELD[dtype]} {name}[LANES];")
        return name

    def row_array(self, name: str, dtype: torch.dtype) -> str:
        """A value a row, of which a block has a few."""
        self.line(f"alignas(64) {HELD[dtype]} {name}[LANES];")
        return name

    # --------------------------------------------------------------------------------------------------------- loops

    def count_blocks(self) -> None:
        if not self.has_rows:
            self.line("const int64_t blocks = (size + block_lanes - 1) / block_lanes;")
            return
        self.line("const int64_t lane_blocks = (size + block_lanes - 1) / block_lanes;")
        self.line("const int64_t row_blocks = (rows + block_rows - 1) / block_rows;")
        outer = [f"size_{d}" for d in range(self.layout.ndim - 2)]
        self.line(f"const int64_t blocks = {' * '.join([*outer, 'row_blocks', 'lane_blocks'])};")

    @contextmanager
    def threads(self) -> Iterator[None]:
        self.line("#pragma omp parallel for num_threads(threads) schedule(static, 1)")
        with self.braces("for (int64_t thread = 0; thread < threads; ++thread)"):
            yield

    @contextmanager
    def blocks(self) -> Iterator[None]:
        self.line("const int64_t end = blocks * (thread + 1) / threads;")
        with self.braces("for (int64_t block = blocks * thread / threads; block < end; ++block)"):
            start = "block % lane_blocks" if self.has_rows else "block"
            self.line(f"const int64_t first = {start} * block_lanes, lanes = min(block_lanes, size - first);")
            if self.has_rows:
                rest = "block / lane_blocks"
                outermost = self.layout.ndim == 2
                self.line(f"const int64_t first_row = {rest}{'' if outermost else ' % row_blocks'} * block_rows;")
                self.line("const int64_t end_row = min(first_row + block_rows, rows);")
                rest += " / row_blocks"
                for d in reversed(range(self.layout.ndim - 2)):
                    self.line(f"const int64_t at_{d} = {rest}{f' % size_{d}' if d else ''};")
                    rest += f" / size_{d}"
            yield

    @contextmanager
    def rows(self, tensors: Iterable[TensorArgument]) -> Iterator[None]:
        """The rows of the block (one, where there is a single dim), with a pointer into each of `tensors`."""
        if self.has_rows:
            with self.braces("for (int64_t row = first_row; row < end_row; ++row)"):
                start = len(self.lines)
                self.line("const int64_t at = (row - first_row) * lanes;")
                self._row_pointers(tensors)
                yield
                if not any(re.search(r"\bat\b", line) for line in self.lines[start + 1 :]):
                    del self.lines[start]
        else:
            self._row_pointers(tensors)
            yield

    def _row_pointers(self, tensors: Iterable[TensorArgument]) -> None:
        for tensor in tensors:
            self.line(f"{tensor.element}* const {tensor.row} = {tensor.row_address()};")

    @contextmanager
    def lanes(self, prefetched: Sequence[str] = ()) -> Iterator[None]:
        """The loop over the lanes; in chunks, where something is to be prefetched."""
        if not prefetched:
            self.line("#pragma omp simd")
            with self.braces("for (int64_t lane = 0; lane < lanes; ++lane)"):
                yield
            return
        self.helpers.add("prefetch")
        with self.braces(f"for (int64_t start = 0; start < lanes; start += {CHUNK})"):
            self.line(f"const int64_t here = min(start + {CHUNK}, lanes);")
            self.line(*(f"prefetch({name} + start, {CHUNK} * sizeof(*{name}));" for name in prefetched))
            self.line("#pragma omp simd")
            with self.braces("for (int64_t lane = start; lane < here; ++lane)"):
                yield

    def next_rows(self, addresses: dict[TensorArgument, str]) -> list[str]:
        """Pointers to what is read next, where that is one run of lanes, for `lanes`; a short row is asked for at once."""
        found = [tensor for tensor in addresses if tensor.inner == 1]
        if self.has_rows:
            found = [tensor for tensor in found if addresses[tensor].startswith(f"{tensor.row} ")]
            self.helpers.update(["prefetch"] if found else [])
            self.line(*(f"prefetch({addresses[t]}, lanes * sizeof({t.element.removeprefix('const ')}));" for t in found))
            return []
        for tensor in found:
            self.line(f"{tensor.element}* const {tensor.prefix}_next = {addresses[tensor]};")
        return [f"{tensor.prefix}_next" for tensor in found]

    def here(self, array: str) -> str:
        """The lane's element of a block's array."""
        return f"{array}[at + lane]" if self.has_rows else f"{array}[lane]"

    # ------------------------------------------------------------------------------------------------------ streaming

    def is_streamed(self, tensor: TensorArgument) -> bool:
        return tensor.timed and tensor.is_result and tensor.inner == 1

    def stages(self, tensors: Iterable[TensorArgument]) -> None:
        """The local rows from which results are streamed."""
        for tensor in filter(self.is_streamed, tensors):
            self.helpers.add("stream")
            self.array(f"{tensor.prefix}_stage", tensor.dtype, tensor.element)

    def targets(self, tensors: Iterable[TensorArgument]) -> None:
        for tensor in filter(self.is_streamed, tensors):
            name = tensor.prefix
            self.line(f"{tensor.element}* const {name}_to = streaming ? {name}_stage : {tensor.row};")

    def store_timed(self, tensor: TensorArgument, value: str) -> None:
        self.line(tensor.store(value, f"{tensor.prefix}_to" if self.is_streamed(tensor) else None))

    def stream_rows(self, tensors: Iterable[TensorArgument]) -> None:
        streamed = [t for t in tensors if self.is_streamed(t)]
        if not streamed:
            return
        with self.braces("if (streaming)"):
            for tensor in streamed:
                self.line(f"stream({tensor.row}, {tensor.prefix}_stage, lanes * sizeof({tensor.element}));")

    # ------------------------------------------------------------------------------------------------------- the whole

    def finish(self) -> KernelSource:
        body = "\n".join(self.lines)
        used = set(re.findall(r"\w+", body))
        parameters = tuple(p for p in self._parameters() if p.name in used)
        lanes = next(n for n, most in ((2048, 16), (1024, 32), (512, 1 << 30)) if self.lane_bytes <= most)
        text = "\n".join([*self._head(lanes, used), self._signature(parameters), body, "}", ""])
        return KernelSource(
            text=text,
            entry=self.entry,
            parameters=parameters,
            lanes=lanes,
            record_bytes=self.record_bytes,
            checkpoint_bytes=self.checkpoint_bytes,
            streamed=tuple(t.index for t in self.tensors.all() if self.is_streamed(t)),
            reversed=tuple(t.index for t in self.tensors.all() if t.reverse),
        )

    def _head(self, lanes: int, used: set[str]) -> list[str]:
        lines = [comment(f"{self.recurrence.name}: {self.direction}")]
        if self.recurrence.equations:
            lines += ["//", *(comment(f"    {equation}") for equation in self.recurrence.equations)]
        is_alone = is_bf16_alone(self.helpers, (t.dtype for t in self.tensors.all()))
        lines += ["", "#include <cstdint>", prelude(self.helpers - {"bf16"} | {"bf16_alone"} if is_alone else self.helpers)]
        if "LANES" in used:
            lines.append(f"constexpr int64_t LANES = {lanes};  // of a block, at most: what it keeps stays in cache")
            lines.append("")
        return lines

    def _signature(self, parameters: tuple[Parameter, ...]) -> str:
        rows, row = [], ""
        for parameter in parameters:
            piece = f"{parameter.declaration}, "
            if len(row) + len(piece) > 112:
                rows.append(row)
                row = ""
            row += piece
        rows.append(row)
        inside = "\n".join(f"    {r.rstrip()}" for r in rows).rstrip(",")
        return f'extern "C" void {self.entry}(\n{inside}) {{'

    def _parameters(self) -> Iterator[Parameter]:
        ndim = self.layout.ndim
        for tensor in self.tensors.all():
            yield Parameter(f"{tensor.element}* {tensor.pointer}", "pointer", tensor.index)
        yield Parameter("int64_t steps", "steps")
        for d in range(ndim):
            name = {ndim - 1: "size", ndim - 2: "rows"}.get(d, f"size_{d}")
            yield Parameter(f"int64_t {name}", "size", dim=d)
        for tensor in self.tensors.all():
            if tensor.timed:
                yield Parameter(f"int64_t {tensor.prefix}_stride_t", "stride_t", tensor.index)
            for d in range(ndim):
                yield Parameter(f"int64_t {tensor.stride(d)}", "stride", tensor.index, d)
        for name in ("block_lanes", "block_rows", "segment", "streaming", "threads", "scratch_bytes"):
            yield Parameter(f"{'bool' if name == 'streaming' else 'int64_t'} {name}", name)
        yield Parameter("char* scratch", "scratch")

"""The forward kernel: states of a block of lanes stay in local arrays while the block runs through all steps."""

from __future__ import annotations

from snn_compile.ir.recurrence import Recurrence
from snn_compile.lowering.cpp.names import Names
from snn_compile.lowering.cpp.region import Invariants, Region
from snn_compile.lowering.cpp.writer import KernelSource, Writer
from snn_compile.lowering.layout import Layout


def forward_source(recurrence: Recurrence, layout: Layout) -> KernelSource:
    writer = Writer(recurrence, "forward", layout)
    names = Names()
    operands = [names.unique(o.name) for o in recurrence.operands]
    first_const = len(recurrence.carries) + len(recurrence.xs)
    constants = {first_const + i: tensor for i, tensor in enumerate(writer.tensors.consts)}
    wanted = range(len(recurrence.carries) + len(recurrence.ys))
    region = Region(writer, recurrence.step.graph, wanted, operands, constants, Invariants(names))
    region.emit_kernel_values()
    writer.count_blocks()
    with writer.threads(), writer.blocks():
        _emit_block(writer, region)
    return writer.finish()


def _emit_block(writer: Writer, region: Region) -> None:
    tensors, recurrence = writer.tensors, writer.recurrence
    states = [
        writer.array(f"{init.stem}_lanes", carry.dtype) for init, carry in zip(tensors.inits, recurrence.carries, strict=True)
    ]
    writer.stages(tensors.ys)
    if states:
        with writer.rows(tensors.inits), writer.lanes():
            for state, init in zip(states, tensors.inits, strict=True):
                writer.line(f"{writer.here(state)} = {init.load()};")
    region.emit_hoisted()
    with writer.braces("for (int64_t t = 0; t < steps; ++t)"):
        _emit_step(writer, region, states)
    if tensors.finals:
        with writer.rows(tensors.finals.values()), writer.lanes():
            for i, final in tensors.finals.items():
                writer.line(final.store(writer.here(states[i])))


def _emit_step(writer: Writer, region: Region, states: list[str]) -> None:
    tensors, recurrence = writer.tensors, writer.recurrence
    read = [x for i, x in enumerate(tensors.xs, len(states)) if region.reads(i)]
    loads = {i: writer.here(state) for i, state in enumerate(states)}
    loads |= {i: x.load() for i, x in enumerate(tensors.xs, len(states))}
    with writer.rows([*read, *region.tensors(), *tensors.ys]):
        writer.targets(tensors.ys)
        emitter = region.emit_rows()
        with writer.lanes(writer.next_rows({x: f"{x.row} + {x.prefix}_stride_t" for x in read})):
            region.emit_lanes(emitter, loads)
            for i, (state, carry) in enumerate(zip(states, recurrence.carries, strict=True)):
                writer.line(f"{writer.here(state)} = {region.value(emitter, i, carry.dtype)};")
            for i, (y, spec) in enumerate(zip(tensors.ys, recurrence.ys, strict=True), len(states)):
                writer.store_timed(y, region.value(emitter, i, spec.dtype))
        writer.stream_rows(tensors.ys)

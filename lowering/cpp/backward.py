"""The backward kernel: the trajectory of a block of lanes is replayed from x, segment by segment, and walked back.

Nothing of size [T, N] is saved by the forward pass or allocated here: a thread records the states before each step of
one segment in a scratch that stays in its L2 cache, and one checkpoint of the states a segment. Where T fits one
segment, x comes from memory once. A recurrence whose gradient does not depend on its states replays nothing.

Only what the gradient reads is recorded, and only what the recorded states come from is replayed.
"""

from __future__ import annotations

from torch import fx

from snn_compile.ir.recurrence import Recurrence
from snn_compile.lowering.cpp.emit import needed, results
from snn_compile.lowering.cpp.literals import HELD, held_bytes
from snn_compile.lowering.cpp.names import Names
from snn_compile.lowering.cpp.region import Invariants, Region
from snn_compile.lowering.cpp.tensors import TensorArgument, operand_specs
from snn_compile.lowering.cpp.writer import KernelSource, Writer
from snn_compile.lowering.layout import Layout


def backward_source(recurrence: Recurrence, layout: Layout) -> KernelSource:
    return _Backward(recurrence, layout).source()


class _Backward:
    def __init__(self, recurrence: Recurrence, layout: Layout) -> None:
        assert recurrence.backward is not None
        self.recurrence = recurrence
        self.writer = writer = Writer(recurrence, "backward", layout)
        self.tensors = writer.tensors
        self.differentiable = [i for i, c in enumerate(recurrence.carries) if c.differentiable]
        everything = range(len(results(recurrence.backward.graph)))
        self.recorded = _states_read(recurrence, recurrence.backward.graph, everything)
        self.replayed = _states_behind(recurrence, self.recorded)
        names = Names()
        operands = [names.unique(o.name) for o in operand_specs(recurrence)]
        cotangents = [names.unique(f"grad_next_{recurrence.carries[i].name}") for i in self.differentiable]
        cotangents += [names.unique(f"grad_{y.name}") for y in recurrence.differentiable_ys]
        first_const = len(recurrence.carries) + len(recurrence.xs)
        constants = {first_const + i: tensor for i, tensor in enumerate(self.tensors.consts)}
        invariants = Invariants(names)
        self.replay = Region(writer, recurrence.step.graph, self.replayed, operands, constants, invariants)
        self.step = Region(writer, recurrence.backward.graph, everything, operands + cotangents, constants, invariants)

    def source(self) -> KernelSource:
        writer = self.writer
        self.replay.emit_kernel_values()
        self.step.emit_kernel_values()
        writer.count_blocks()
        if self.recorded:
            writer.line("const int64_t segments = (steps + segment - 1) / segment;")
        with writer.threads():
            if self.recorded:
                self._emit_scratch()
            with writer.blocks():
                self._emit_block()
        return writer.finish()

    # --------------------------------------------------------------------------------------------------------- scratch

    def _stem(self, carry: int) -> str:
        return self.tensors.inits[carry].stem

    def _emit_scratch(self) -> None:
        """The thread's own: records of a segment, then a checkpoint a segment."""
        writer = self.writer
        writer.line(f"const int64_t capacity = {'block_rows * block_lanes' if writer.has_rows else 'block_lanes'};")
        writer.line("char* here = scratch + thread * scratch_bytes;")
        for kind, count, carries in (("record", "segment", self.recorded), ("checkpoint", "segments", self.replayed)):
            for i in carries:
                dtype = self.recurrence.carries[i].dtype
                setattr(writer, f"{kind}_bytes", getattr(writer, f"{kind}_bytes") + held_bytes(dtype))
                c_type = HELD[dtype]
                writer.line(f"{c_type}* const {self._stem(i)}_{kind} = reinterpret_cast<{c_type}*>(here);")
                writer.line(f"here += {count} * capacity * sizeof({c_type});")
        writer.lines.pop()  # nobody reads the end of the last one

    def _copy(self, to: str, source: str) -> None:
        """``to`` and ``source``: templates over the name of the state."""
        writer = self.writer
        with writer.rows(()), writer.lanes():
            for i in self.replayed:
                writer.line(f"{to.format(self._stem(i))} = {source.format(self._stem(i))};")

    # ----------------------------------------------------------------------------------------------------------- block

    def _emit_block(self) -> None:
        writer, tensors = self.writer, self.tensors
        for i in self.replayed:
            writer.array(f"{self._stem(i)}_lanes", self.recurrence.carries[i].dtype)
        for i in self.differentiable:
            writer.array(f"{self._gradient(i)}_lanes", self.recurrence.carries[i].dtype)
        for grad in tensors.grad_consts.values():
            writer.array(f"{grad.stem}_sum", grad.dtype)
        writer.stages(tensors.grad_xs)
        self._emit_start()
        self.replay.emit_hoisted()
        self.step.emit_hoisted()
        if self.recorded:
            self._emit_segments()
        else:
            with writer.braces("for (int64_t t = steps - 1; t >= 0; --t)"):
                self._emit_reverse_step()
        self._emit_end()

    def _gradient(self, carry: int) -> str:
        for known in (self.tensors.ct_finals, self.tensors.grad_inits):
            if carry in known:
                return known[carry].stem
        return self._other_gradients[carry]

    @property
    def _other_gradients(self) -> dict[int, str]:
        if not hasattr(self, "_stems_of_gradients"):
            taken = {**self.tensors.ct_finals, **self.tensors.grad_inits}
            missing = [i for i in self.differentiable if i not in taken]
            self._stems_of_gradients = {
                i: self.writer.stems.unique(f"grad_{self.recurrence.carries[i].name}") for i in missing
            }
        return self._stems_of_gradients

    def _emit_start(self) -> None:
        writer, tensors = self.writer, self.tensors
        inits = [tensors.inits[i] for i in self.replayed]
        if not (inits or self.differentiable or tensors.grad_consts):
            return
        with writer.rows([*inits, *tensors.ct_finals.values()]), writer.lanes():
            for init in inits:
                writer.line(f"{writer.here(f'{init.stem}_lanes')} = {init.load()};")
            for i in self.differentiable:
                start = tensors.ct_finals[i].load() if i in tensors.ct_finals else "0"
                writer.line(f"{writer.here(f'{self._gradient(i)}_lanes')} = {start};")
            for grad in tensors.grad_consts.values():
                writer.line(f"{writer.here(f'{grad.stem}_sum')} = 0;")

    def _emit_end(self) -> None:
        writer, tensors = self.writer, self.tensors
        stored = [*tensors.grad_inits.values(), *tensors.grad_consts.values()]
        if not stored:
            return
        with writer.rows(stored), writer.lanes():
            for i, grad in tensors.grad_inits.items():
                writer.line(grad.store(writer.here(f"{self._gradient(i)}_lanes")))
            for grad in tensors.grad_consts.values():
                writer.line(grad.store(writer.here(f"{grad.stem}_sum")))

    # -------------------------------------------------------------------------------------------------------- segments

    def _emit_segments(self) -> None:
        writer = self.writer
        writer.line("// forwards through all segments but the last one, leaving a checkpoint before each;")
        writer.line("// then, last to first, each is replayed and walked back")
        with writer.braces("for (int64_t visit = 0; visit < 2 * segments - 1; ++visit)"):
            writer.line("const bool replays = visit >= segments - 1;")
            writer.line("const int64_t number = replays ? 2 * segments - 2 - visit : visit;")
            writer.line("const int64_t begin = number * segment, stop = min(begin + segment, steps);")
            at_checkpoint = f"{{}}_checkpoint[number * capacity + {'at + ' if writer.has_rows else ''}lane]"
            at_state = writer.here("{}_lanes")
            with writer.braces("if (!replays)"):
                self._copy(at_checkpoint, at_state)
            with writer.braces("else if (visit >= segments)"):
                self._copy(at_state, at_checkpoint)
            with writer.braces("for (int64_t t = begin; t < stop; ++t)"):
                self._emit_replayed_step()
            with writer.braces("for (int64_t t = stop - 1; replays && t >= begin; --t)"):
                self._emit_reverse_step()

    def _record(self, carry: int) -> str:
        return self.writer.here(f"{self._stem(carry)}_then")

    def _emit_records(self) -> None:
        for i in self.recorded:
            c_type = HELD[self.recurrence.carries[i].dtype]
            stem = self._stem(i)
            self.writer.line(f"{c_type}* const {stem}_then = {stem}_record + (t - begin) * capacity;")

    def _emit_replayed_step(self) -> None:
        writer, recurrence, region = self.writer, self.recurrence, self.replay
        self._emit_records()
        loads = {i: writer.here(f"{self._stem(i)}_lanes") for i in self.replayed}
        read = self._series(region, loads)
        with writer.rows([*read, *region.tensors()]):
            emitter = region.emit_rows()
            with writer.lanes():
                for i in self.recorded:
                    writer.line(f"{self._record(i)} = {loads[i]};")
                region.emit_lanes(emitter, loads)
                for i in self.replayed:
                    writer.line(f"{loads[i]} = {region.value(emitter, i, recurrence.carries[i].dtype)};")

    def _series(self, region: Region, loads: dict[int, str]) -> list[TensorArgument]:
        """Add the loads of the time series; those that the region reads."""
        read = []
        for i, x in enumerate(self.tensors.xs, len(self.recurrence.carries)):
            loads[i] = x.load()
            if region.reads(i):
                read.append(x)
        return read

    def _emit_reverse_step(self) -> None:
        writer, tensors, region = self.writer, self.tensors, self.step
        self._emit_records()
        loads = {i: self._record(i) for i in self.recorded}
        read = self._series(region, loads)
        cotangent = len(self.recurrence.carries) + len(self.recurrence.xs) + len(self.recurrence.consts)
        for i, carry in enumerate(self.differentiable, cotangent):
            loads[i] = writer.here(f"{self._gradient(carry)}_lanes")
        for i, ct in enumerate(tensors.ct_ys, cotangent + len(self.differentiable)):
            loads[i] = ct.load()
            if region.reads(i):
                read.append(ct)
        with writer.rows([*read, *region.tensors(), *tensors.grad_xs]):
            writer.targets(tensors.grad_xs)
            emitter = region.emit_rows()
            with writer.lanes():
                region.emit_lanes(emitter, loads)
                self._emit_gradients(emitter)
            writer.stream_rows(tensors.grad_xs)

    def _emit_gradients(self, emitter) -> None:  # type: ignore[no-untyped-def]
        writer, tensors, region, recurrence = self.writer, self.tensors, self.step, self.recurrence
        for result, carry in enumerate(self.differentiable):
            value = region.value(emitter, result, recurrence.carries[carry].dtype)
            writer.line(f"{writer.here(f'{self._gradient(carry)}_lanes')} = {value};")
        result = len(self.differentiable)
        for grad in tensors.grad_xs:
            writer.store_timed(grad, region.value(emitter, result, grad.dtype))
            result += 1
        for grad in tensors.grad_consts.values():
            if region.results[result] is not None:
                writer.line(f"{writer.here(f'{grad.stem}_sum')} += {region.value(emitter, result, grad.dtype)};")
            result += 1


# ------------------------------------------------------------------------------------------------------ graph analysis


def _states_read(recurrence: Recurrence, graph: fx.Graph, wanted) -> list[int]:  # type: ignore[no-untyped-def]
    """The carries whose value before the step these results depend on."""
    returned = results(graph)
    live = set(needed(graph, [returned[i] for i in wanted]))
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    return [i for i in range(len(recurrence.carries)) if placeholders[i] in live]


def _states_behind(recurrence: Recurrence, states: list[int]) -> list[int]:
    """`states` and the carries that they are computed from, at any step."""
    found = set(states)
    while True:
        more = found | set(_states_read(recurrence, recurrence.step.graph, sorted(found)))
        if more == found:
            return sorted(found)
        found = more

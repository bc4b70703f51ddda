"""The backward kernel: the trajectory of a block of lanes is replayed from x, segment by segment, and walked back.

Nothing of size [T, N] is saved by the forward pass or allocated here: a thread records the states before each step of
one segment in a scratch that stays in its L2 cache, and one checkpoint of the states a segment. Where T fits one
segment, x comes from memory once. A recurrence whose gradient does not depend on its states replays nothing.

Only what the gradient reads is recorded, and only what the recorded states come from is replayed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import fx

from snn_compile.ir.recurrence import Recurrence
from snn_compile.lowering.cpp.cut import values_to_record
from snn_compile.lowering.cpp.emit import Emitter, needed, results, wanted_name
from snn_compile.lowering.cpp.literals import HELD, held_bytes
from snn_compile.lowering.cpp.names import Names
from snn_compile.lowering.cpp.region import Invariants, Region
from snn_compile.lowering.cpp.tensors import TensorArgument
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
        names = Names()
        operands = [names.unique(o.name) for o in recurrence.operands]
        cotangents = [names.unique(f"grad_next_{recurrence.carries[i].name}") for i in self.differentiable]
        cotangents += [names.unique(f"grad_{y.name}") for y in recurrence.differentiable_ys]
        invariants = Invariants(names)
        pairs = values_to_record(recurrence, operands, operands + cotangents, invariants.numbering)
        #: what the replay records: the node in the step, in the step's backward, and the name of its arrays
        self.recorded = [(s, b, self._stem_of_record(s)) for s, b in pairs]
        self.replayed = _states_behind(recurrence, [s for s, _, _ in self.recorded])
        first_const = len(recurrence.carries) + len(recurrence.xs)
        constants = {first_const + i: tensor for i, tensor in enumerate(self.tensors.consts)}
        step, backward = recurrence.step.graph, recurrence.backward.graph
        extra, given = [s for s, _, _ in self.recorded], [b for _, b, _ in self.recorded]
        self.replay = Region(writer, step, self.replayed, operands, constants, invariants, extra=extra)
        everything = range(len(results(backward)))
        self.step = Region(writer, backward, everything, operands + cotangents, constants, invariants, given=given)

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

    def _stem_of_record(self, node: fx.Node) -> str:
        if node.op != "placeholder":
            return self.writer.stems.unique(wanted_name(node))
        return self._stem([n for n in node.graph.nodes if n.op == "placeholder"].index(node))

    def _stem(self, carry: int) -> str:
        return self.tensors.inits[carry].stem

    def _emit_scratch(self) -> None:
        """The thread's own: records of a segment, then a checkpoint a segment."""
        writer = self.writer
        writer.line(f"const int64_t capacity = {'block_rows * block_lanes' if writer.has_rows else 'block_lanes'};")
        writer.line("char* here = scratch + thread * scratch_bytes;")
        arrays = [(f"{stem}_record", "segment", node.meta["val"].dtype) for node, _, stem in self.recorded]
        states = [(f"{self._stem(i)}_checkpoint", self.recurrence.carries[i].dtype) for i in self.replayed]
        arrays += [(name, "segments", dtype) for name, dtype in states]
        for name, count, dtype in arrays:
            c_type = HELD[dtype]
            writer.line(f"{c_type}* const {name} = reinterpret_cast<{c_type}*>(here);")
            writer.line(f"here += {count} * capacity * sizeof({c_type});")
        writer.lines.pop()  # nobody reads the end of the last one
        writer.record_bytes = sum(held_bytes(node.meta["val"].dtype) for node, _, _ in self.recorded)
        writer.checkpoint_bytes = sum(held_bytes(dtype) for _, dtype in states)

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
            self._stems_of_gradients = {i: self.writer.stems.unique(f"grad_{self.recurrence.carries[i].name}") for i in missing}
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
            if not writer.has_rows and any(x.inner == 1 for x in self._series(self.replay, {})):
                writer.line("const int64_t next_begin = begin > 0 ? begin - segment : 0;")
                writer.line("const int64_t next_first = begin > 0 ? first : first + block_lanes;")
            with writer.braces("for (int64_t t = stop - 1; replays && t >= begin; --t)"):
                self._emit_reverse_step()

    def _emit_records(self) -> None:
        """Where this step is in the records."""
        for node, _, stem in self.recorded:
            c_type = HELD[node.meta["val"].dtype]
            self.writer.line(f"{c_type}* const {stem}_then = {stem}_record + (t - begin) * capacity;")

    def _emit_replayed_step(self) -> None:
        writer, recurrence, region = self.writer, self.recurrence, self.replay
        self._emit_records()
        states = {i: writer.here(f"{self._stem(i)}_lanes") for i in self.replayed}
        loads = dict(states)
        read = self._series(region, loads)
        with writer.rows([*read, *region.tensors()]):
            emitter = region.emit_rows()
            with writer.lanes():
                region.emit_lanes(emitter, loads)
                for node, _, stem in self.recorded:
                    writer.line(f"{writer.here(f'{stem}_then')} = {emitter.values[node].code};")
                for i, state in states.items():
                    writer.line(f"{state} = {region.value(emitter, i, recurrence.carries[i].dtype)};")

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
        loads: dict[int, str] = {}
        given = {}
        for _, node, stem in self.recorded:
            given[node] = writer.here(f"{stem}_then")
            if node.op == "placeholder":
                loads[region.positions[node]] = given[node]
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
            with writer.lanes(writer.next_rows(self._read_next(read))):
                region.emit_lanes(emitter, loads, given)
                self._emit_gradients(emitter)
            writer.stream_rows(tensors.grad_xs)

    def _read_next(self, read: list[TensorArgument]) -> dict[TensorArgument, str]:
        """Where the rows are that are read next: those of the step before, and the inputs of the next replay.

        The walk back is bound by arithmetic, the replay by memory: so the replay's inputs are fetched during the walk.
        """
        addresses = {tensor: f"{tensor.row} - {tensor.prefix}_stride_t" for tensor in read}
        for x in self._series(self.replay, {}):
            step = f"(next_begin + stop - 1 - t) * {x.prefix}_stride_t"
            addresses.setdefault(x, f"{x.pointer} + {step} + next_first")
        return addresses

    def _emit_gradients(self, emitter: Emitter) -> None:
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


def _states_read(recurrence: Recurrence, wanted: Iterable[object]) -> list[int]:
    """The carries whose value before the step these values of the step depend on."""
    live = set(needed(recurrence.step.graph, wanted))
    placeholders = [n for n in recurrence.step.graph.nodes if n.op == "placeholder"]
    return [i for i in range(len(recurrence.carries)) if placeholders[i] in live]


def _states_behind(recurrence: Recurrence, values: Sequence[fx.Node]) -> list[int]:
    """The carries that `values` are computed from, at this step and those before."""
    returned = results(recurrence.step.graph)
    found: list[int] = []
    while True:
        more = _states_read(recurrence, [*values, *(returned[i] for i in found)])
        if more == found:
            return found
        found = more

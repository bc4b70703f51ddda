"""The backward kernel.

It keeps nothing of the forward pass. A first sweep runs the step again from the initial state and leaves the state at
the start of every segment of SEGMENT steps in scratch memory; then, segment by segment from the last one, the states of
one segment are recomputed into registers and the cotangents walk back over them. Where T <= SEGMENT there is no first
sweep, and where the backward step reads no state there are no segments at all.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from snn_compile.ir.recurrence import Recurrence
from snn_compile.lowering.layout import Layout
from snn_compile.lowering.ops import opmath
from snn_compile.lowering.triton.analysis import closure, needed, output_nodes, pick, states_read
from snn_compile.lowering.triton.emit import Emitter, Environment, update
from snn_compile.lowering.triton.kernel import Kernel, free
from snn_compile.lowering.triton.literals import TRITON_DTYPES
from snn_compile.lowering.triton.memory import Argument, as_block
from snn_compile.lowering.triton.text import KernelText, defining, indent
from snn_compile.lowering.triton.values import ROUNDING, Value, number


class BackwardKernel(Kernel):
    direction = "backward"

    def __init__(self, recurrence: Recurrence, layout: Layout) -> None:
        super().__init__(recurrence, layout)
        r = recurrence
        assert r.backward is not None
        self.graph = r.backward.graph
        self.differentiable = [i for i, c in enumerate(r.carries) if c.differentiable]
        self.ct_ys = [self.tensor(f"grad_{y.name}", y.dtype, timed=True, reverse=y.reverse) for y in r.differentiable_ys]
        self.ct_finals = {
            i: self.tensor(f"grad_{c.name}_final", c.dtype) for i, c in enumerate(r.carries) if c.is_result and c.differentiable
        }
        self.grad_inits = {i: self.tensor(f"grad_{c.name}_init", c.dtype) for i, c in enumerate(r.carries) if c.init_needs_grad}
        self.grad_xs = [
            self.tensor(free(self.names, f"grad_{x.name}", "in"), x.dtype, timed=True, reverse=x.reverse)
            for x in r.xs
            if x.needs_grad
        ]
        self.grad_consts = [self.tensor(f"grad_{c.name}", opmath(c.dtype)) for c in r.consts if c.needs_grad]
        self.cts = {i: self.names.unique(f"grad_{r.carries[i].name}") for i in self.differentiable}
        self.ct_y_names = [self.names.unique(f"grad_{y.name}") for y in r.differentiable_ys]
        self.accumulators = [self.names.unique(f"grad_{c.name}") for c in r.consts if c.needs_grad]
        self._analyse()

    def _analyse(self) -> None:
        """Which cotangents are live, which nodes are needed, which states and inputs they read."""
        r, n, m = self.recurrence, len(self.recurrence.carries), len(self.recurrence.xs)
        placeholders = [p for p in self.graph.nodes if p.op == "placeholder"]
        results = output_nodes(self.graph)
        d = len(self.differentiable)
        first_ct = n + m + len(r.consts)
        self.ct_placeholders = dict(zip(self.differentiable, placeholders[first_ct:], strict=False))
        self.ct_y_placeholders = placeholders[first_ct + d :]
        self.ct_results = dict(zip(self.differentiable, results[:d], strict=True))
        self.x_results, self.const_results = results[d : d + len(self.grad_xs)], results[d + len(self.grad_xs) :]

        def cotangents_read(live: set[int]) -> set[int]:
            nodes = needed(self.graph, [*(self.ct_results[i] for i in live), *results[d:]])
            return {i for i, p in self.ct_placeholders.items() if p in nodes}

        self.live = closure(set(self.grad_inits), cotangents_read)
        self.results = [*(self.ct_results[i] for i in self.live), *results[d:]]
        self.nodes = needed(self.graph, self.results)
        self.states_read = [i for i in range(n) if placeholders[i] in self.nodes]
        self.xs_read = [i for i in range(m) if placeholders[n + i] in self.nodes]
        self.ct_ys_read = [i for i, p in enumerate(self.ct_y_placeholders) if p in self.nodes]
        # to recompute those states, the step may need others
        step = r.step.graph
        step_results = output_nodes(step)
        self.recomputed = closure(set(self.states_read), lambda live: states_read(step, pick(step_results, live), n))
        self.step_nodes = needed(step, pick(step_results, self.recomputed))
        step_placeholders = [p for p in step.nodes if p.op == "placeholder"]
        self.step_xs = [i for i in range(m) if step_placeholders[n + i] in self.step_nodes]

    def generate(self) -> KernelText:
        step = self.recurrence.step.graph
        lines, env = self.prelude([(step, self.step_nodes), (self.graph, self.nodes)])
        lines += self._start_cotangents()
        lines += self._segments(env) if self.states_read else self._plain_loop(env)
        lines += [t.store(self.cts[i], "inside") for i, t in self.grad_inits.items()]
        for tensor, name, result in zip(self.grad_consts, self.accumulators, self.const_results, strict=True):
            lines.append(tensor.store("0.0" if result is None else name, "inside"))
        return self.assemble(lines)

    def _start_cotangents(self) -> list[str]:
        lines = []
        for i in self.live:
            final = self.ct_finals.get(i)
            if final is None:
                dtype = TRITON_DTYPES[opmath(self.recurrence.carries[i].dtype)]
                lines.append(f"{self.cts[i]} = tl.zeros([BLOCK], {dtype})")
            else:
                lines.append(f"{self.cts[i]} = {as_block(final.value(final.load('inside')))}")
        for tensor, name, result in zip(self.grad_consts, self.accumulators, self.const_results, strict=True):
            if result is not None:
                lines.append(f"{name} = tl.zeros([BLOCK], {TRITON_DTYPES[tensor.dtype]})")
        return lines

    def _plain_loop(self, env: Environment) -> list[str]:
        """The backward step reads no state: nothing to recompute."""
        loop = [*self.load_inputs(self.xs_read, "inside"), *self._load_cotangents("inside")]
        loop += self._step_back(env, "inside")
        return ["for i in range(T):", *indent(defining("t = T - 1 - i", loop))]

    def _segments(self, env: Environment) -> list[str]:
        """Everything that a segment reads is loaded ahead of its recurrence, so that the loads overlap."""
        starts = self._start_addresses()
        states = [self.states[i] for i in self.states_read]
        loaded = [self.x_names[i] for i in self.xs_read] + [self.ct_y_names[i] for i in self.ct_ys_read]
        steps = {name: self.names.unique(f"{name}_steps") for name in (*states, *loaded)}
        r = self.recurrence
        self.kept = tuple(r.carries[i].dtype for i in self.states_read) + tuple(r.xs[i].dtype for i in self.xs_read)
        self.kept += tuple(self.ct_ys[i].dtype for i in self.ct_ys_read)

        sweep = [*self.load_inputs(self.step_xs, "inside"), *self._recompute(env)]
        save = [f"tl.store({starts[i]}, {self.states[i]}, mask=inside)" for i in self.recomputed]
        again = self.load_inputs(sorted({*self.step_xs, *self.xs_read}), "live", "t < T") + self._load_cotangents("live", "t < T")
        again += [f"{all_steps} = {all_steps} + ({name},)" for name, all_steps in steps.items()]
        again += self._recompute(env)
        back = [f"{name} = {all_steps}[k]" for name, all_steps in steps.items()]
        back += self._step_back(env, "live", "t < T")
        position, live = "t = segment * SEGMENT + k", "live = inside & (t < T)"
        segment = [
            "# the states of this segment",
            *(f"{all_steps} = ()" for all_steps in steps.values()),
            "for k in tl.static_range(SEGMENT):",
            *indent(defining(position, defining(live, again))),
            "# and back over them",
            "for k in tl.static_range(SEGMENT - 1, -1, -1):",
            *indent(defining(position, defining(live, back))),
            *self._load_starts(starts),
        ]
        return [
            "# the states at the start of every segment",
            *self.load_states(self.recomputed),
            "segments = tl.cdiv(T, SEGMENT)",
            "for segment in range(segments - 1):",
            *indent([*save, "for k in tl.static_range(SEGMENT):", *indent(defining(position, sweep))]),
            "tl.debug_barrier()  # all starts are stored before one is loaded",
            "for segment in range(segments - 1, -1, -1):",
            *indent(segment),
        ]

    def _start_addresses(self) -> dict[int, str]:
        """Scratch memory for the start of every segment, one row a segment, for each state that is recomputed."""
        starts = {}
        for i in self.recomputed:
            name, dtype = self.names.unique(f"{self.states[i]}_start_ptr"), self.recurrence.carries[i].dtype
            self.scratch.append(Argument(name, "scratch", len(self.scratch), aligned=True, dtype=dtype))
            starts[i] = f"{name} + segment * N + lane"
        return starts

    def _load_starts(self, starts: dict[int, str]) -> list[str]:
        """The state at the start of the segment before this one, if there is one."""
        lines = []
        for i, address in starts.items():
            load = f"tl.load({address.replace('segment *', '(segment - 1) *')}, mask=inside & (segment > 0))"
            widen = ".to(tl.float32)" if self.recurrence.carries[i].dtype in ROUNDING else ""
            lines.append(f"{self.states[i]} = {load}{widen}")
        return lines

    def _recompute(self, env: Environment) -> list[str]:
        """One step of the states, and nothing else."""
        step = self.recurrence.step.graph
        results = output_nodes(step)
        emitter = Emitter(self.names.copy(), env)
        emitter.emit(self.step_nodes, [r for r in pick(results, self.recomputed) if r is not None])
        updates = [(self.states[i], emitter.env[results[i]]) for i in self.recomputed]  # type: ignore[index]
        return [str(s) for s in update(emitter.statements, updates)]

    def _load_cotangents(self, mask: str, in_range: str = "") -> list[str]:
        return [f"{self.ct_y_names[i]} = {self.ct_ys[i].load(mask, in_range=in_range)}" for i in self.ct_ys_read]

    def _step_back(self, env: Environment, mask: str, in_range: str = "") -> list[str]:
        """One step of the cotangents. Where a step may lie beyond T, `in_range` tells, and nothing changes there."""
        env = dict(env)
        for i in self.live:
            env[self.ct_placeholders[i]] = Value.variable(self.cts[i], self.recurrence.carries[i].dtype)
        for tensor, name, node in zip(self.ct_ys, self.ct_y_names, self.ct_y_placeholders, strict=True):
            env[node] = tensor.value(name)
        emitter = Emitter(self.names.copy(), env)
        emitter.emit(self.nodes, [r for r in self.results if r is not None])
        for tensor, result in zip(self.grad_xs, self.x_results, strict=True):
            value = _zero(tensor.dtype) if result is None else emitter.env[result]
            emitter.store(tensor.store(value.text, mask), value)
        for name, result in zip(self.accumulators, self.const_results, strict=True):
            if result is not None:
                value = emitter.env[result]
                text = f"tl.where({in_range}, {value.text}, 0.0)" if in_range else value.text
                emitter.store(f"{name} += {text}", value)
        updates = []
        for i in self.live:
            result = self.ct_results[i]
            value = _zero(self.recurrence.carries[i].dtype) if result is None else emitter.env[result]
            updates.append((self.cts[i], _only(in_range, value, self.cts[i])))
        return [str(s) for s in update(emitter.statements, updates)]


def _only(condition: str, value: Value, old: str) -> Value:
    if not condition or value.text == old:
        return value
    return replace(value, text=f"tl.where({condition}, {value.text}, {old})", block=True, number=None, uses=value.uses | {old})


def _zero(dtype: torch.dtype) -> Value:
    return number(0, dtype)

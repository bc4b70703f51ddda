"""The forward kernel.

A program owns BLOCK lanes and runs all time steps for them; the states stay in registers.
"""

from __future__ import annotations

from snn_compile.lowering.triton.analysis import closure, needed, output_nodes, pick, states_read
from snn_compile.lowering.triton.emit import Emitter, update
from snn_compile.lowering.triton.kernel import Kernel, free
from snn_compile.lowering.triton.text import KernelText, indent


class ForwardKernel(Kernel):
    direction = "forward"

    def generate(self) -> KernelText:
        r = self.recurrence
        ys = [self.tensor(free(self.names, y.name, "seq"), y.dtype, timed=True, reverse=y.reverse) for y in r.ys]
        finals = {i: self.tensor(f"{c.name}_final", c.dtype) for i, c in enumerate(r.carries) if c.is_result}
        graph, n = r.step.graph, len(r.carries)
        placeholders = [p for p in graph.nodes if p.op == "placeholder"]
        results = output_nodes(graph)
        states = closure(set(finals), lambda live: states_read(graph, pick(results, live) + results[n:], n))
        wanted = pick(results, states) + results[n:]
        nodes = needed(graph, wanted)
        prelude, env = self.prelude([(graph, nodes)])

        emitter = Emitter(self.names.copy(), env)
        emitter.emit(nodes, [w for w in wanted if w is not None])
        for y, result in zip(ys, results[n:], strict=True):
            value = emitter.env[result]  # type: ignore[index]
            emitter.store(y.store(value.text, "inside"), value)
        updates = [(self.states[i], emitter.env[results[i]]) for i in states]  # type: ignore[index]
        step = update(emitter.statements, updates)

        used = [i for i in range(len(self.xs)) if placeholders[n + i] in nodes]
        loop = [*self.load_inputs(used, "inside"), *map(str, step)]
        stores = [t.store(self.states[i], "inside") for i, t in finals.items()]
        return self.assemble([*prelude, *self.load_states(states), "for t in range(T):", *indent(loop or ["pass"]), *stores])

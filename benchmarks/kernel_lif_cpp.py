"""The two C++ kernels of a LIF beside copying one of their tensors: ``python benchmarks/kernel_lif_cpp.py [T N rounds]``.

Forward reads x and writes s, backward reads x and grad s and writes grad x: five tensors, the traffic of 2.5 copies.
All runs of a round are interleaved, so that what else happens on the machine hits all of them.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch

from snn_compile.ir.recurrence import Carry, Output, TimeSeries
from snn_compile.lowering.cpp.target import CppTarget
from snn_compile.lowering.launch import allocate_gradients, allocate_results
from snn_compile.lowering.layout import place
from snn_compile.passes.trace_step import trace_step


class Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(u)
        return (u >= 0).to(u.dtype)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (u,) = ctx.saved_tensors
        s = torch.sigmoid(4.0 * u)
        return grad * (1 - s) * s * 4.0


def lif(v, x):  # type: ignore[no-untyped-def]
    h = v + (x - v) / 2.0
    s = Spike.apply(h - 1.0)
    return h * (1 - s), s


def runs(steps: int, lanes: int) -> dict[str, Callable[[], object]]:
    recurrence = trace_step(
        lif,
        name="lif",
        carries=[Carry("v", torch.float32)],
        xs=[TimeSeries("x", torch.float32, needs_grad=True)],
        consts=[],
        ys=[Output("s", torch.float32)],
        shape=(3,),
    )
    operands = [torch.zeros(lanes), torch.randn(steps, lanes)]
    forward = [*operands, *allocate_results(recurrence, operands, steps)]
    backward = [*operands, torch.randn(steps, lanes), *allocate_gradients(recurrence, operands, steps)]
    target, copied = CppTarget(), torch.empty_like(operands[1])
    placements = place((lanes,), forward, [False, True, True]), place((lanes,), backward, [False, True, True, True])
    kernels = [
        target.kernel(recurrence, direction, placement.layout).bind(tensors, placement, steps)
        for direction, placement, tensors in zip(("forward", "backward"), placements, (forward, backward), strict=True)
    ]
    return {
        "copy": lambda: copied.copy_(operands[1]),
        "forward": lambda: kernels[0](forward),
        "backward": lambda: kernels[1](backward),
    }


def main() -> None:
    given = [int(a) for a in sys.argv[1:4]]
    steps, lanes, rounds = [*given, *(64, 524288, 25)[len(given) :]]
    timed: dict[str, list[float]] = {name: [] for name in ("copy", "forward", "backward")}
    calls = runs(steps, lanes)
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            timed[name].append((time.perf_counter() - start) * 1e3)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, T={steps}, N={lanes}, fp32, {rounds} rounds, ms")
    for summary, of in (("median", statistics.median), ("minimum", min)):
        copy, forward, backward = (of(times) for times in timed.values())
        ratio = (forward + backward) / (2.5 * copy)
        print(f"{summary:8s} copy {copy:6.2f}  forward {forward:6.2f}  backward {backward:6.2f}  of the floor {ratio:.2f}")


if __name__ == "__main__":
    main()

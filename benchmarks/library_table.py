"""Write `docs/library_backend.md`: what the backend makes of every module of the library.

    python benchmarks/library_table.py [--without-speed]

Each row: the module called twice over a sequence (so that the second call goes on from the first one's states), and the time of
a training step beside eager and Inductor, all in one run.
"""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import _harness as h
import torch
from _device import machine
from _results import markdown
from torch import nn

from snn_compile import functional
from snn_compile.backend import snn

sys.path.insert(0, str(Path(__file__).parent.parent))  # the modules are those of the tests
from tests.library.modules import Module, Size, multi_step, stateful
from tests.library.outcome import outcome
from tests.library.test_backend import NO_KERNEL

DOCS = Path(__file__).parent.parent / "docs"
SMALL, LARGE = Size(4, 3, 6), Size(16, 64, 512)
ROUNDS = 5


def training_step(module: nn.Module, run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> Callable[[], None]:
    def step() -> None:
        functional.reset_net(module)
        module.zero_grad()
        run(x).sum().backward()

    step()  # compiles
    return step


def times(case: Module) -> dict[str, float]:
    """Seconds of a training step, multi-step form."""
    x = case.inputs(LARGE.steps).requires_grad_()
    made = case.make("m")
    runs = {}
    for name, backend in (("eager", None), ("inductor", "inductor"), ("snn", snn)):
        torch._dynamo.reset()
        module = copy.deepcopy(made)
        run = module if backend is None else torch.compile(module, backend=backend)  # type: ignore[call-overload]
        runs[name] = training_step(module, run, x)
    return h.medians(h.interleaved(runs, rounds=ROUNDS))


def row(small: Module, large: Module, modes: str, speed: bool) -> dict[str, str]:
    found = {mode: outcome(small, mode, SMALL.steps) for mode in modes}
    compiled = []
    for mode, o in found.items():
        first = o.reports[0]
        kinds = {"kernel": len(first.recurrences), "program": len(first.stepped)}
        compiled.append(f"{mode}: " + (", ".join(f"{n} {kind}" for kind, n in kinds.items() if n) or "-"))
    forward = max(o.forward for o in found.values())
    measured = times(large) if speed else {}
    ratios = {f"vs {name}": f"{measured[name] / measured['snn']:.1f}" for name in ("eager", "inductor") if speed}
    return {
        "module": small.name,
        "compiled": "; ".join(compiled),
        "forward": "bit for bit" if forward == 0.0 else f"{forward:.0e}",
        "gradients": f"{max(o.gradients for o in found.values()):.0e}",
        **ratios,
        "note": NO_KERNEL.get(small.name, ""),
    }


def main() -> None:
    logging.disable(logging.WARNING)
    speed = "--without-speed" not in sys.argv
    pairs = [(a, b, "sm") for a, b in zip(stateful(SMALL), stateful(LARGE), strict=True)]
    pairs += [(a, b, "m") for a, b in zip(multi_step(SMALL), multi_step(LARGE), strict=True)]
    rows = []
    for small, large, modes in pairs:
        rows.append(row(small, large, modes, speed))
        print(markdown(rows[-1:], list(rows[-1])).splitlines()[-1], flush=True)
    about = machine()
    measured = (
        f" Speed: a training step of [T={LARGE.steps}, {LARGE.batch}, {LARGE.channels}] (images: 2x2 more) in multi-step mode, "
        f"median of {ROUNDS} interleaved runs."
        if speed
        else ""
    )
    text = f"""# The library under `backend="snn"`

Written by `python benchmarks/library_table.py`; each row is also a test (`tests/library/test_backend.py`). `s`: the module in
single-step mode inside a user's loop; `m`: in multi-step mode. *Kernel*: a pointwise recurrence as one kernel over all steps;
*program*: kernels and calls, once a step (here from {SMALL.steps} steps on, `step_from={SMALL.steps}`). Forward and gradients:
the largest difference from eager, relative to the largest value of the tensor, over two calls in a row.{measured}
{about["machine"]}, torch {about["torch"]}, {about["date"]}. The same recurrences compile for GPUs
(`tests/lowering/triton`); nothing was measured there.

{markdown(rows, list(rows[0]))}
"""
    (DOCS / "library_backend.md").write_text(text)


if __name__ == "__main__":
    main()

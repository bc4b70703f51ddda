"""What the backend makes of a module of the library: what it found, and how far the compiled results are from eager's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from snn_compile.backend import listeners, snn
from snn_compile.pipeline import Report
from tests.library.modules import Module, states

#: Eager's stream of random numbers, so that dropout can be compared; programs for short sequences, too.
OPTIONS = {"fallback_random": True, "step_from": 4}


@dataclass
class Outcome:
    """Of one module in one step mode, called twice in a row, so that the second call goes on from the first one's states."""

    reports: list[Report] = field(default_factory=list)
    #: largest difference relative to eager's largest value; 0.0 is bit for bit
    forward: float = 0.0
    gradients: float = 0.0

    @property
    def kernels(self) -> list[int]:
        """Recurrences that became kernels, graph by graph."""
        return [len(r.recurrences) for r in self.reports]

    @property
    def reasons(self) -> list[str]:
        """Why a recurrence was left to Inductor; look-alikes that are no recurrences are left out."""
        found = [r.reason for report in self.reports for r in report.rejections]
        return list(dict.fromkeys(r for r in found if "from step to step, which is" in r))


def in_a_loop(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """The user's own loop around a module in single-step mode."""
    return lambda x_seq: torch.stack([module(x) for x in x_seq.unbind(0)])


def call_of(module: nn.Module, mode: str) -> Callable[[Tensor], Tensor]:
    return module if mode == "m" else in_a_loop(module)


def outcome(case: Module, mode: str, steps: int) -> Outcome:
    module = case.make(mode)
    reference = copy.deepcopy(module)
    x_seqs = [case.inputs(steps, seed=seed) for seed in (1, 2)]
    torch._dynamo.reset()
    with _reports() as reports:
        compiled = torch.compile(call_of(module, mode), backend=snn, options=OPTIONS)
        got = _run(module, compiled, x_seqs)
    expected = _run(reference, call_of(reference, mode), x_seqs)
    found = Outcome(reports)
    for kind in ("forward", "gradients"):
        pairs = list(zip(got[kind], expected[kind], strict=True))
        assert all(a.dtype == b.dtype and a.shape == b.shape for a, b in pairs)
        setattr(found, kind, max((_distance(a, b) for a, b in pairs), default=0.0))
    return found


def _run(module: nn.Module, call: Callable[[Tensor], Tensor], x_seqs: list[Tensor]) -> dict[str, list[Tensor]]:
    torch.manual_seed(0)
    inputs = [x.clone().requires_grad_() for x in x_seqs]
    outputs = [call(x) for x in inputs]
    sum((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum() for y in outputs).backward()  # type: ignore[union-attr]
    left = [*states(module).values(), *module.buffers()]
    leaves = [*inputs, *module.parameters()]
    return {
        "forward": [v.detach() for v in (*outputs, *left)],
        "gradients": [torch.zeros_like(p) if p.grad is None else p.grad for p in leaves],
    }


def _distance(a: Tensor, b: Tensor) -> float:
    if torch.equal(a, b):
        return 0.0
    a, b = a.double(), b.double()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))


@contextmanager
def _reports() -> Iterator[list[Report]]:
    reports: list[Report] = []
    listeners.append(reports.append)
    try:
        yield reports
    finally:
        listeners.remove(reports.append)

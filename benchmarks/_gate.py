"""What stands before every timing: a compiled function's results are eager's, or nothing of its row is timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._dynamo.utils import counters

#: what the backend counts where it changed a loop, and how that is called in a table
CHANGES = {
    "recurrences_lowered": "kernels",
    "recurrences_stepped": "programs",
    "convolutions_replaced": "convolutions replaced",
    "ops_time_batched": "ops over all steps",
}
NOTHING = "left to Inductor"


class Refused(Exception):
    """The row is not timed."""


@dataclass(frozen=True)
class Limits:
    """How far results may be from eager's: the first is the output, the others are gradients."""

    equal: float = 1.0  # the share of the output's elements that are equal
    output: float = float("inf")  # ||output - eager's|| / ||eager's||
    gradient: float = 1e-3  # the same of each gradient; sums in another order differ by more


@dataclass(frozen=True)
class Agreement:
    mean: float  # of the output: the spikes of a neuron and step
    equal: float = float("nan")
    output: float = float("nan")
    gradient: float = float("nan")

    @classmethod
    def of(cls, got: Sequence[Tensor], expected: Sequence[Tensor]) -> Agreement:
        """NaN where there is nothing to compare: a peer whose tensors are others."""
        mean = got[0].double().mean().item() if got else float("nan")
        if [t.shape for t in got] != [t.shape for t in expected]:
            return cls(mean)
        output, *gradients = (error(a, b) for a, b in zip(got, expected, strict=True))
        return cls(mean, (got[0] == expected[0]).double().mean().item(), output, max(gradients, default=0.0))

    def require(self, limits: Limits, who: str) -> None:
        # (a comparison with NaN is False)
        if not (self.equal >= limits.equal and self.output <= limits.output and self.gradient <= limits.gradient):
            raise Refused(f"{who}: {self} is outside of {limits}")


def error(got: Tensor, expected: Tensor) -> float:
    """``||got - expected|| / ||expected||``; a result that is not finite is infinitely far away."""
    norm = expected.double().norm()
    apart = ((got.double() - expected.double()).norm() / norm.clamp(min=torch.finfo(torch.float32).tiny)).item()
    return apart if apart == apart else float("inf")


def compiled(who: str) -> str:
    """What the backend made since the counters were cleared. A row may not time Inductor under our name without saying so."""
    found = counters["snn_compile"]
    if found["pass_failures"]:
        raise Refused(f"{who}: a pass failed, and the graph went to Inductor")
    return ", ".join(f"{found[name]} {title}" for name, title in CHANGES.items() if found[name]) or NOTHING

"""Every module of the library through `backend="snn"`, in both step modes: one kernel a recurrence, eager's numbers."""

from __future__ import annotations

import pytest

from snn_compile.lowering.cpp import compiler
from tests.library.modules import MULTI_STEP, STATEFUL, T
from tests.library.outcome import outcome

pytestmark = pytest.mark.skipif(compiler.missing() is not None, reason="no C++ compiler")

#: What has no kernel of ours, and why.
NO_KERNEL = {
    "Dropout": "no recurrence: one mask for all steps",
    "Dropout2d": "no recurrence: one mask for all steps",
    "MultiStepDropout": "no recurrence: one mask for all steps",
    "MultiStepDropout2d": "no recurrence: one mask for all steps",
    "DropConnectLinear": "no recurrence: weights sampled once",
    "PSN": "no recurrence: one matrix product over time",
    "MaskedPSN": "no recurrence: one matrix product over time",
    "SlidingPSN": "no recurrence: one convolution over time",
    "SeqToANNContainer": "no recurrence: one call over all steps",
}

#: Calls between the kernels of a step.
STEPPED = {
    "MPBNLIFNode-2d": "statistics of the potential over the batch",
    "MPBNLIFNode-learnable": "statistics of the potential over the batch",
    "MPBNLIFNode-4d": "statistics of the potential over batch and space",
    "LinearRecurrentContainer": "a linear map of the spikes",
    "ILCIFNode": "a convolution of the spikes",
    "ILCLIFNode": "a convolution of the spikes",
    "ILCCUBALIFNode": "a convolution of the spikes",
}

#: exp, tanh or a batch norm in the step: the last place may differ
ROUNDED = ("EIFNode", "MPBNLIFNode", "LIAFNode")


def check(case, mode: str, steps: int) -> None:  # type: ignore[no-untyped-def]
    found = outcome(case, mode, steps)
    assert found.forward <= (1e-6 if case.name.startswith(ROUNDED) else 0.0)
    assert found.gradients <= 1e-5
    if case.name in NO_KERNEL:
        return
    stepped = [len(r.stepped) for r in found.reports]
    assert all(n == (case.name not in STEPPED) for n in found.kernels), (found.kernels, found.reasons)
    if case.name != "MPBNLIFNode-folded":  # the neuron is one kernel, its adapting statistics are stepped
        assert all(n == (case.name in STEPPED) for n in stepped), (stepped, found.reasons)
    lengths = [r.meta["steps"] for report in found.reports for r in (*report.recurrences, *report.stepped)]
    assert all(n == steps for n in lengths)  # none is peeled


@pytest.mark.parametrize("case", STATEFUL, ids=str)
def test_stateful(case):
    check(case, "m", 5)


@pytest.mark.parametrize("case", STATEFUL, ids=str)
def test_single_steps(op_by_op, case):
    """In the user's own loop."""
    check(case, "s", 5)


@pytest.mark.parametrize("case", MULTI_STEP, ids=str)
def test_multi_step(case):
    check(case, "m", T)

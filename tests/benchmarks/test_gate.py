"""Nothing is timed whose results are not eager's; a peer that does not run costs its own cells only."""

from __future__ import annotations

import _harness as h
import pytest
import torch
from _gate import Limits, Refused
from torch import Tensor
from torch._dynamo.utils import counters

CPU = torch.device("cpu")
SPIKES, GRADIENT = torch.tensor([0.0, 1.0, 1.0, 0.0]), torch.tensor([0.5, -1.0, 2.0, 0.25])


def maker(*results: Tensor, compiles: bool = True):
    def make():
        counters["snn_compile"]["recurrences_lowered"] += compiles
        return lambda: list(results)

    return make


def contest(limits: Limits = Limits(), **makers) -> h.Contest:  # noqa: B008
    return h.contest({"eager": maker(SPIKES, GRADIENT, compiles=False), **makers}, CPU, limits, "a row")


def test_equal_results_pass():
    found = contest(snn=maker(SPIKES.clone(), GRADIENT * (1 + 1e-6)))
    assert list(found.steps) == ["eager", "snn"]
    assert found.agreement["snn"].equal == 1.0
    assert found.agreement["snn"].mean == 0.5


@pytest.mark.parametrize(
    "results",
    [
        pytest.param((1 - SPIKES, GRADIENT), id="other spikes"),
        pytest.param((SPIKES, GRADIENT * 1.01), id="another gradient"),
        pytest.param((SPIKES, GRADIENT * float("nan")), id="a gradient of NaN"),
        pytest.param((SPIKES * float("nan"), GRADIENT), id="an output of NaN"),
        pytest.param((SPIKES[:2], GRADIENT), id="another shape"),
        pytest.param((SPIKES,), id="no gradient"),
    ],
)
def test_a_wrong_result_is_refused(results):
    with pytest.raises(Refused, match="a row, snn"):
        contest(snn=maker(*results))


def test_limits_are_those_of_the_row():
    with pytest.raises(Refused):
        contest(Limits(gradient=1e-3), snn=maker(SPIKES, GRADIENT * 1.01))
    assert contest(Limits(gradient=0.1), snn=maker(SPIKES, GRADIENT * 1.01)).agreement["snn"].gradient == pytest.approx(0.01)


def test_inductor_under_our_name_is_said():
    values = lambda framework: {"median_ms": "1"}  # noqa: E731
    for compiles, said in ((True, "1 kernels"), (False, "left to Inductor")):
        rows = contest(snn=maker(SPIKES, GRADIENT, compiles=compiles)).rows({"row": "LIF"}, values)
        assert [r["compiled"] for r in rows] == ["", said]


def test_a_failed_pass_is_refused():
    def make():
        counters["snn_compile"]["pass_failures"] += 1
        return lambda: [SPIKES, GRADIENT]

    with pytest.raises(Refused, match="a pass failed"):
        contest(snn=make)


def test_a_wrong_peer_is_written_down():
    found = contest(snn=maker(SPIKES, GRADIENT), inductor=maker(1 - SPIKES, GRADIENT))
    assert found.agreement["inductor"].equal == 0.0


def test_a_missing_peer_is_an_empty_cell():
    def missing():
        raise ImportError("No module named 'spikingjelly'")

    found = contest(snn=maker(SPIKES, GRADIENT), spikingjelly=missing)
    rows = found.rows({"row": "LIF"}, lambda framework: {"median_ms": f"{len(framework)}"})
    assert [(r["row"], r["framework"], r["median_ms"]) for r in rows] == [
        ("LIF", "eager", "5"),
        ("LIF", "snn", "3"),
        ("LIF", "spikingjelly", ""),
    ]


def test_eager_and_the_backend_must_run():
    def broken():
        raise ValueError("out of luck")

    with pytest.raises(ValueError, match="out of luck"):
        contest(snn=broken)

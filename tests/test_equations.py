"""Equations, surrogate slopes and affinity of a step, read off its graph."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

import snn_compile
from snn_compile.ir import equations, names, symbolic
from snn_compile.ir.recurrence import Recurrence
from snn_compile.ir.slope import surrogate
from tests import zoo


def recurrences(case: zoo.Case) -> list[Recurrence]:
    from snn_compile.config import Config
    from snn_compile.pipeline import run_pipeline

    found: list[Recurrence] = []

    def collect(gm, example_inputs):
        found.extend(run_pipeline(gm, Config())[1].recurrences)
        return gm.forward

    torch._dynamo.reset()
    inputs = [i.requires_grad_() if i.is_floating_point() else i for i in case.inputs(6)]
    torch.compile(case.function, backend=collect)(*inputs)
    return found


def lines(name: str) -> list[str]:
    (recurrence,) = recurrences(zoo.CASES[name])
    return [f"{e.role}: {e}" for e in equations.equations(recurrence)]


def test_lif() -> None:
    assert lines("lif") == ["charge: h = v + (x - v)/2", "fire: s = H(h - 1)", "reset: v' = h*(1 - s)"]


def test_a_reset_to_zero_is_not_written_out() -> None:
    def lif(x: torch.Tensor) -> torch.Tensor:
        v, out = torch.zeros_like(x[0]), []
        for t in range(x.shape[0]):
            h = v + (x[t] - (v - 0.0)) / 2.0
            s = (h >= 1.0).to(h.dtype)
            v = 0.0 * s + (1.0 - s) * h
            out.append(s)
        return torch.stack(out)

    (recurrence,) = snn_compile.explain(lif)(torch.randn(6, 5)).recurrences
    found = [f"{e.role}: {e}" for e in equations.equations(recurrence)]
    assert found == ["charge: h = v + (x - v)/2", "fire: s = H(h - 1)", "reset: v' = (1 - s)*h"]


def test_strict_threshold_and_soft_reset() -> None:
    found = lines("lif_soft_reset_detached_with_state")
    assert found == ["charge: h = 0.9*v + x", "fire: s = [h - 1 > 0]", "reset: v' = h - s"]


def test_parameters_have_the_users_names() -> None:
    assert lines("per_channel_threshold_and_decay")[:2] == ["charge: h = v*d + x", "fire: s = H(h - th)"]
    assert "sigmoid(w)" in lines("parametric_lif")[0]


def test_two_states() -> None:
    found = lines("cuba_lif_two_states")
    assert found[:2] == ["reset: c' = c*c_decay + x", "charge: h = v*v_decay + c'"]


@pytest.mark.parametrize(
    ("name", "slope"),
    [
        ("lif", lambda u: 4 * torch.sigmoid(4 * u) * (1 - torch.sigmoid(4 * u))),
        ("accumulated", lambda u: 4 * torch.sigmoid(4 * u) * (1 - torch.sigmoid(4 * u))),
        ("izhikevich", lambda u: 4 * torch.sigmoid(4 * u) * (1 - torch.sigmoid(4 * u))),
        ("lif_soft_reset_detached_with_state", lambda u: 1 / (1 + (torch.pi * u) ** 2)),
        ("filled_in", lambda u: 1 / (10 * u.abs() + 1) ** 2),
        ("straight_through", lambda u: (1 - u.abs()).clamp(min=0) - torch.where(u.abs() <= 1, u * u.sign(), 0)),
    ],
)
def test_surrogate_is_the_slope(name: str, slope) -> None:
    (recurrence,) = recurrences(zoo.CASES[name])
    text = surrogate(recurrence)
    u = torch.linspace(-1.5, 1.5, 32, dtype=torch.float64)  # (not at 1: which side's slope a kink has differs between versions)
    known = {"sigmoid": torch.sigmoid, "abs": torch.abs, "sgn": torch.sgn}
    known["where"] = lambda c, a, b: torch.where(c, a, b)
    known["clamp"] = lambda x, low: x.clamp(min=low)
    assert text is not None
    torch.testing.assert_close(eval(text, {"__builtins__": {}}, {**known, "u": u}), slope(u), rtol=1e-5, atol=1e-6)


def test_no_gradient_no_slope() -> None:
    (recurrence,) = recurrences(zoo.CASES["masked_reset"])
    assert surrogate(recurrence) is None


@pytest.mark.parametrize(("name", "affine"), [("lif", True), ("cuba_lif_two_states", True), ("izhikevich", False)])
def test_affine_charge(name: str, affine: bool) -> None:
    (recurrence,) = recurrences(zoo.CASES[name])
    assert symbolic.is_affine(recurrence) is affine


@pytest.mark.parametrize("name", sorted(zoo.CASES))
def test_every_case_has_equations_quickly(name: str) -> None:
    for recurrence in recurrences(zoo.CASES[name]):
        seconds = min(_time(recurrence) for _ in range(3))
        found = equations.equations(recurrence)
        assert seconds < 0.02
        assert len({e.name for e in found}) == len(found)
        operands = equations.operand_names(recurrence)
        states = operands[: len(recurrence.carries)]
        assert len(set(operands)) == len(operands)
        assert {f"{s}'" for s in states} <= {e.name for e in found}


def _time(recurrence: Recurrence) -> float:
    start = time.perf_counter()
    equations.equations(recurrence)
    return time.perf_counter() - start


def test_falls_back_to_plain_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    (recurrence,) = recurrences(zoo.CASES["lif"])
    monkeypatch.setattr(equations, "spike_of_state", lambda r: 1 / 0)
    assert any("sub(" in str(e) for e in equations.equations(recurrence))


def test_time_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symbolic, "MAX_SECONDS", 0.05)
    assert symbolic.capped(lambda: time.sleep(0.5) or 1) is None
    assert symbolic.capped(lambda: 1 / 0) is None
    assert symbolic.capped(lambda: 7) == 7


@pytest.mark.parametrize(
    ("name", "nice"),
    [("l_w_", "w"), ("l_self_modules_lif_parameters_tau_", "tau"), ("v_12", "v"), ("x", "x"), ("l_x_", "x")],
)
def test_names(name: str, nice: str) -> None:
    assert names.nice_name(name) == nice


class Named(nn.Module):
    """A neuron whose parameters are called as users call them."""

    def __init__(self) -> None:
        super().__init__()
        self.β = nn.Parameter(torch.tensor(0.9))
        self.taus = nn.ParameterList([nn.Parameter(torch.tensor(2.0))])
        self.p = {"v_rest": torch.zeros(3)}
        self._gain_2 = torch.tensor(0.5)
        self.register_buffer("θ", torch.ones(3))

    def forward(self, x):
        v, out = torch.zeros_like(x[0]), []
        for t in range(len(x)):
            v = self.β * v + (x[t] * self._gain_2 - self.p["v_rest"]) / self.taus[0]
            s = zoo.Sigmoid.apply(v - self.θ, 4.0)
            v = v - s * self.θ
            out.append(s)
        return torch.stack(out)


def test_parameters_have_the_names_of_attributes() -> None:
    found = snn_compile.explain(Named())(torch.rand(5, 2, 3))
    (recurrence,) = found.recurrences
    assert equations.operand_names(recurrence) == ["v", "x", "β", "gain2", "v_rest", "taus0", "θ"]
    assert "h = β*v + (x*gain2 - v_rest)/taus0" in str(found) and found.kernels


def test_the_report_lists_the_names_of_the_equations() -> None:
    """The value of the step before and the one before that have one name in the code."""

    def f(x):
        before, last, out = torch.zeros_like(x[0]), torch.zeros_like(x[0]), []
        for t in range(len(x)):
            v = torch.tanh(x[t] - before)
            before, last = last, v
            out.append(v)
        return torch.stack(out)

    text = str(snn_compile.explain(f)(torch.rand(6, 3)))
    assert "states       v, v2" in text and "v2'" in text

"""Other people's code, unmodified: equal to eager, forward bit for bit, and compiled."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_leaves

from snn_compile.backend import snn
from snn_compile.compat import LIBRARIES, prepare
from snn_compile.explain import PREPARED, explain
from tests.ecosystem.models import Model, has, models
from tests.passes.capture import Spike

FOUND = {str(m): m for m in models()}


def results(module: nn.Module, x: torch.Tensor, run):  # type: ignore[no-untyped-def]
    out = run(x)
    out = out if isinstance(out, tuple) else (out,)
    wanted = [o for o in out if o.requires_grad]
    weights = [torch.linspace(0.5, 1.5, o.numel()).view(o.shape) for o in wanted]
    leaves = [x, *(p for p in module.parameters() if p.requires_grad)]
    return out, torch.autograd.grad(wanted, leaves, weights, allow_unused=True)


def both(model: Model):  # type: ignore[no-untyped-def]
    """(eager, compiled): values and gradients."""
    made = []
    for compiled in (False, True):
        torch.manual_seed(0)
        module, x = model.build() if compiled else model.make(), model.inputs()
        made.append(results(module, x, torch.compile(module, backend=snn, options={"step_from": 4}) if compiled else module))
    return made


@pytest.mark.skipif(not FOUND, reason="no other library is installed (pip install --no-deps snntorch spikingjelly norse sinabs)")
@pytest.mark.parametrize("name", FOUND)
def test_model(op_by_op, name):
    model = FOUND[name]
    torch._dynamo.reset()
    counters.clear()
    (values, gradients), (got, got_gradients) = both(model)
    for a, b in zip(values, got, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=model.atol)
    for a, b in zip(gradients, got_gradients, strict=True):
        if a is not None or b is not None:
            torch.testing.assert_close(b, a, rtol=0, atol=1e-5 * max(1e-6, float(a.abs().max())))
    compiled = sum(counters["snn_compile"][c] for c in ("recurrences_lowered", "recurrences_stepped"))
    assert compiled >= model.recurrences, str(explain(model.build(), step_from=4)(model.inputs()))
    if model.reason:
        assert not compiled, f"'{name}' is compiled now: say so in tests/ecosystem/models.py"


@pytest.mark.skipif(not has("snntorch"), reason="snnTorch is not installed")
def test_prepare_keeps_the_state_dict():
    import snntorch

    def make(reset):
        return nn.Sequential(snntorch.Leaky(beta=0.9, reset_mechanism=reset))

    plain, prepared = make("zero"), prepare(make("zero"))
    assert prepared.state_dict().keys() == plain.state_dict().keys()
    for name, value in plain.state_dict().items():
        assert torch.equal(prepared.state_dict()[name], value), name
    other = prepare(make("none"))
    other.load_state_dict(plain.state_dict())
    assert other[0].reset_mechanism_val == 1
    make("none").load_state_dict(prepared.state_dict())
    assert prepare(prepared) is prepared and copy.deepcopy(prepared)[0].reset_mechanism_val == 1


class ByInstance(nn.Module):
    """A surrogate as it is often written: an instance of the function, whose `apply` is called."""

    def __init__(self):
        super().__init__()
        self.spike = Spike()

    def forward(self, x):
        v, out = torch.zeros_like(x[0]), []
        for t in range(x.shape[0]):
            v = v * 0.25 + x[t]
            s = self.spike.apply(v - 1.0)
            v = v - s
            out.append(s)
        return torch.stack(out)


def test_prepare_after_a_graph_break(fresh, op_by_op):
    layer, x = ByInstance(), torch.rand(6, 3, requires_grad=True)
    before = explain(layer)(x)
    assert not before.recurrences and all("compat.prepare" in b.hint for b in before.graph_breaks)
    assert "compat.prepare(model)" in str(before)
    assert prepare(layer).spike is Spike
    assert len(explain(layer)(x).recurrences) == 1
    assert torch.equal(torch.compile(layer, backend="snn", fullgraph=True)(x), layer(x))


def test_explain_knows_the_libraries_that_can_be_prepared():
    assert set(LIBRARIES) == PREPARED


def test_prepare_leaves_other_modules_alone():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.spike_fn = torch.nn.functional.relu
            self.state_fallback = lambda x: x

    own = Own()
    before = dict(vars(own))
    assert prepare(own) is own and vars(own) == before


@pytest.mark.skipif(not has("norse"), reason="Norse is not installed")
@pytest.mark.parametrize(
    "name", ["LIFCell", "LIFRecurrentCell", "LSNNCell", "LSNNRecurrentCell", "IzhikevichCell", "LIFRefracCell"]
)
def test_prepared_initial_state_of_norse(name):
    import norse.torch as nt

    make = getattr(nt, name)
    cell = make(3, 7) if "Recurrent" in name else make(nt.tonic_spiking) if name == "IzhikevichCell" else make()
    x = torch.rand(5, 3)
    expected = tree_leaves(cell.state_fallback(x) if hasattr(cell, "state_fallback") else cell.initial_state(x))
    prepare(cell)
    got = tree_leaves(cell.state_fallback(x) if hasattr(cell, "state_fallback") else cell.initial_state(x))
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(b, a.detach(), rtol=0, atol=0, check_dtype=True)


@pytest.mark.skipif(not has("norse"), reason="Norse is not installed")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["LIFCell", "LIFExCell", "LSNNCell", "LIFRecurrentCell", "LILinearCell"])
def test_prepared_cells_of_norse_keep_dtypes_and_follow_parameters(name, dtype):
    import norse.torch as nt

    cell = (getattr(nt, name)(3, 3) if name in ("LIFRecurrentCell", "LILinearCell") else getattr(nt, name)()).to(dtype)
    x = torch.rand(5, 3, dtype=dtype)
    for leak in (0.0, 0.5):  # (read again in every call)
        cell.p = cell.p._replace(v_leak=torch.tensor(leak, dtype=dtype))
        expected = tree_leaves(copy.deepcopy(cell)(x))
        got = tree_leaves(prepare(copy.deepcopy(cell))(x))
        for a, b in zip(expected, got, strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=0)


@pytest.mark.skipif(not has("norse"), reason="Norse is not installed")
def test_a_hint_to_prepare_is_given_where_it_helps(fresh, op_by_op):
    import norse.torch as nt

    x = torch.rand(5, 3, 8)
    layer = nt.IzhikevichRecurrent(8, 8, nt.tonic_spiking)
    assert "compat.prepare" in str(explain(layer)(x))
    expected = layer(x)[0]
    torch._dynamo.reset()
    found = explain(prepare(layer))(x)
    assert not found.graph_breaks and torch.equal(layer(x)[0], expected)

    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nt.IzhikevichCell(nt.tonic_spiking)  # its first state is its parameters' own, which is marked

        def forward(self, x, state=None):
            out = []
            for t in range(len(x)):
                s, state = self.cell(x[t], state)
                out.append(s)
            return torch.stack(out)

    loop = prepare(Loop())
    text = str(explain(loop)(x))
    assert "where it has been, hand in the first state" in text
    torch._dynamo.reset()
    assert len(explain(loop)(x, loop.cell.spiking_method.s).recurrences) == 1


@pytest.mark.skipif(not has("norse"), reason="Norse is not installed")
def test_a_recurrent_layer_of_norse_is_one_program(fresh):
    """Its size is a tensor, which ends Dynamo's graph; a number, once prepared."""
    import norse.torch as norse

    layer = norse.LIFRecurrent(8, 12)
    reference, layer = copy.deepcopy(layer), prepare(copy.deepcopy(layer))  # (a copy has no hook of its weights any more)
    assert layer.hidden_size == 12 and type(layer.hidden_size) is int
    x = torch.rand(8, 4, 8) * 20
    found = explain(layer, step_from=4)(x)
    assert len(found.stepped) == 1 and found.graphs == 1, str(found)
    expected, got = reference(x)[0], torch.compile(layer, backend=snn, options={"step_from": 4})(x)[0]
    assert torch.equal(got, expected) and expected.any()
    for a, b in zip(reference.parameters(), layer.parameters(), strict=True):
        (wanted,), (gradient,) = (
            torch.autograd.grad(o.square().sum(), p, retain_graph=True) for o, p in ((expected, a), (got, b))
        )
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-5)


def test_a_learnt_initial_state_of_norse_is_left_alone():
    import norse.torch as nt

    cell = nt.LIFCell()
    leak = nn.Parameter(torch.zeros(()))
    cell.state_fallback = fallback = lambda x: (leak * 1.0, torch.zeros_like(x))
    assert prepare(cell).state_fallback is fallback

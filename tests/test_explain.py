"""What `explain` says, and that it leaves what it explains as it was."""

from __future__ import annotations

import copy
import itertools
import logging
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import snn_compile
from snn_compile import backend, outer_loop
from snn_compile.explain import GraphBreak
from snn_compile.ir.equations import operand_names
from snn_compile.pipeline import COUNTERS
from tests import zoo

pytestmark = pytest.mark.usefixtures("op_by_op")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    outer_loop._warned = False
    yield
    torch._dynamo.reset()


def explained(name: str) -> snn_compile.Explanation:
    case = zoo.CASES[name]
    return snn_compile.explain(case.function)(*[i.requires_grad_() for i in case.inputs(6)])


def test_report_of_a_lif() -> None:
    found = explained("lif")
    text = str(found)
    for part in (
        "1 recurrence compiled, from 1 time loop",
        "zoo.py:",
        "6, each over [6, 7] (float32)",
        "charge       h = v + (x - v)/2",
        "fire         s = H(h - 1)",
        "reset        v' = h*(1 - s)",
        "the charge is affine",
        "ds/du = ",
        "8 bytes forward, 12 backward, per lane and step",
        "cpp",
    ):
        assert part in text, part
    assert [k[1] for k in found.kernels] == ["forward", "backward"]
    assert all("//     h = v + (x - v)/2" in k[2] for k in found.kernels)
    assert not found.graph_breaks and "Left to Inductor" not in text


def test_accumulator_moves_no_output() -> None:
    text = str(explained("accumulated"))
    assert "4 bytes forward, 8 backward" in text and "acc summed in it" in text


def test_two_layers_have_two_recurrences_and_no_noise() -> None:
    found = explained("linear_layers_in_the_loop")
    assert len(found.recurrences) == 2 and len(found.loops) == 1
    assert "Left to Inductor" not in str(found)
    assert len(found.verbose()) >= len(str(found))


def test_layers_one_after_another_are_no_steps() -> None:
    net = nn.Sequential(*(m for _ in range(6) for m in (nn.Linear(5, 5), nn.Tanh())))
    found = snn_compile.explain(net)(torch.randn(3, 5))
    assert "the function must hold the loop over time itself" in str(found) and "Left to Inductor" not in str(found)
    assert "weights of its own every time: layers, one after another" in found.verbose()


class Block(nn.Module):
    """A layer over all steps, and a neuron; recurrent where it has weights for its own spikes."""

    def __init__(self, inputs: int, outputs: int, recurrent: bool = False) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, outputs)
        self.back = nn.Linear(outputs, outputs) if recurrent else nn.Identity()

    def forward(self, x):
        y, out = self.layer(x.relu()), []
        v = s = torch.zeros_like(y[0])
        for t in range(len(y)):
            v = v * 0.5 + y[t] + self.back(s)
            s = (v > 1.0).to(v.dtype)
            v = v - s
            out.append(s)
        return torch.stack(out)


@pytest.mark.parametrize("sizes", [(8, 8, 8), (8, 10, 6, 4)])
def test_blocks_of_layers_are_no_refused_loop(sizes: tuple[int, ...]) -> None:
    net = nn.Sequential(*(Block(a, b) for a, b in itertools.pairwise(sizes)))
    found = snn_compile.explain(net)(torch.rand(4, 2, sizes[0]))
    assert len(found.recurrences) == len(sizes) - 1 and "Left to Inductor" not in str(found)


def test_blocks_of_layers_do_not_hide_the_loops_inside() -> None:
    net = nn.Sequential(*(Block(8, 8, recurrent=True) for _ in range(3)))
    text = str(snn_compile.explain(net)(torch.rand(6, 2, 8)))
    assert text.count("  - ") == 1 and "'linear' from step to step" in text and "{'step_from': 6}" in text


class OfEachStep(nn.Module):
    """`layers[t]` is what the potential goes through in step t."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        v, out = torch.zeros_like(x[0]), []
        for t in range(len(x)):
            v = self.layers[t](v * 0.5 + x[t])
            out.append(v)
        return torch.stack(out)


@pytest.mark.parametrize("layer", [nn.Linear(8, 8), nn.BatchNorm1d(8)])
def test_layers_of_a_step_in_the_state_are_a_refusal(layer: nn.Module) -> None:
    net = OfEachStep([copy.deepcopy(layer) for _ in range(6)])
    text = str(snn_compile.explain(net)(torch.rand(6, 2, 8)))
    assert text.count("has weights of its own in every step") == 1 and "share them between steps" in text
    assert "step_from" not in text  # (it would change nothing)


def test_what_no_program_can_run_is_named_before_what_it_can() -> None:
    back = nn.Linear(8, 8)

    def f(x):
        v, out = torch.zeros_like(x[0]), []
        for t in range(len(x)):
            v = back(v) * 0.5 + x[t]
            v = v + torch.randn_like(v)
            out.append(v)
        return torch.stack(out)

    text = str(snn_compile.explain(f)(torch.rand(6, 2, 8)))
    assert "'randn_like' from step to step" in text and "step_from" not in text


def test_a_loop_that_can_be_read_in_several_ways_is_refused_once() -> None:
    gates, read_out = nn.Linear(8, 32), nn.Linear(8, 32)

    def f(x):
        h = c = torch.zeros_like(x[0])
        out = []
        for t in range(len(x)):
            i, f, g, o = torch.split((gates(x[t]) + read_out(h)).sigmoid(), 8, dim=1)
            c = f * c + i * g
            h = o * c
            out.append(h)
        return torch.stack(out)

    found = snn_compile.explain(f)(torch.rand(12, 2, 8))
    assert str(found).count("  - ") == 1 and "'step_from': 12}" in str(found)
    assert found.verbose().count("  - ") > 1


def test_a_write_that_is_no_value_is_named() -> None:
    def into_memory_from_outside(x):
        states, out = torch.zeros(2, *x.shape[1:]), []
        for t in range(len(x)):
            v = states.transpose(0, 1)[:, 0]
            v.mul_(0.5).add_(x[t])
            s = v > 1.0
            v.masked_fill_(s, 0.0)
            out.append(s)
        return torch.stack(out)

    def through_a_view(x):
        v, out = torch.zeros_like(x[0]), []
        for t in range(len(x)):
            v = v * 0.5 + x[t]
            s = v > 1.0
            v.view(-1).masked_fill_(s.view(-1), 0.0)
            out.append(s)
        return torch.stack(out)

    expected = {
        into_memory_from_outside: ("writes into memory from outside of the loop", "v = v.clone()"),
        through_a_view: (
            "'v.view(-1).masked_fill_(s.view(-1), 0.0)' writes into a value of the loop through a view",
            "torch.where",
        ),
    }
    for function, parts in expected.items():
        torch._dynamo.reset()
        text = str(snn_compile.explain(function)(torch.rand(6, 2, 8)))
        assert all(part in text for part in parts) and "not pointwise" not in text and "nothing is carried" not in text


def test_what_a_graph_break_brings_with_it_is_not_listed() -> None:
    def f(x):
        parts = list(x.unbind())
        torch._dynamo.graph_break()
        v, out = torch.zeros_like(x[0]), []
        for part in parts:
            v = torch.tanh(v * 0.5 + part)
            out.append(v)
        return torch.stack(out)

    found = snn_compile.explain(f)(torch.rand(6, 3))
    assert "another tensor in every step" in found.verbose()
    assert "Graph breaks" in str(found) and "Left to Inductor" not in str(found)


def test_layers_beside_a_neuron_are_no_refused_steps() -> None:
    """Whether they are all alike, or of sizes that change half way."""
    for sizes in ([(5, 5)] * 12, [(5, 5)] * 6 + [(5, 9)] + [(9, 9)] * 6):
        layers = [m for size in sizes for m in (nn.Linear(*size), nn.Tanh())]
        found = snn_compile.explain(nn.Sequential(snn_compile.neuron.LIFNode(step_mode="m"), *layers))(torch.randn(16, 3, 5))
        assert len(found.recurrences) == 1 and "Left to Inductor" not in str(found)
        assert "one after another" in found.verbose()


def test_steps_with_large_weights_of_their_own_are_refused() -> None:
    weights = torch.nn.ParameterList(torch.randn(64, 64) for _ in range(6))

    def net(x):
        v, out = torch.zeros_like(x[0]), []
        for t in range(6):
            v = v * 0.5 + x[t] + torch.nn.functional.linear(v, weights[t])
            out.append((v >= 1.0).float())
        return torch.stack(out)

    assert "has weights of its own in every step" in str(snn_compile.explain(net)(torch.randn(6, 2, 64)))


def numbers_that_change(x):
    v, out = torch.zeros_like(x[0]), []
    for t in range(len(x)):
        v = v * 0.5 + x[t] ** (0.1 * t)
        v = torch.where(v > 1, 0.0, v)
        out.append(v)
    return torch.stack(out)


def test_refusal_names_the_line_and_what_to_change_once() -> None:
    found = snn_compile.explain(numbers_that_change)(torch.randn(6, 3))
    text = str(found)
    assert not found.recurrences
    assert text.count("test_explain.py:") == 1 and "x[t] ** (0.1 * t)" in text
    assert "to change: put the numbers into a tensor" in text


def test_matmul_of_the_state_is_a_call_between_kernels() -> None:
    case = zoo.CASES["recurrent_lif"]
    inputs = [i.requires_grad_() for i in case.inputs(6)]
    unrolled = str(snn_compile.explain(case.function)(*inputs))
    assert "no time loop was compiled" in unrolled and "to change: options={'step_from': 6}" in unrolled
    found = snn_compile.explain(case.function, step_from=6)(*inputs)
    assert not found.recurrences and len(found.stepped) == 1
    for part in (
        "1 recurrence compiled, from 1 time loop",
        "6, each a short program",
        "forward      aten.addmm",
        "one kernel of",
        "at the end   2 gradients of parameters",
    ):
        assert part in str(found), part


def test_random_numbers_in_the_state_are_refused() -> None:
    def f(x):
        v, out = torch.zeros_like(x[0]), []
        for t in range(len(x)):
            v = torch.dropout(v * 0.5 + x[t], 0.5, True)
            out.append(v)
        return torch.stack(out)

    text = str(snn_compile.explain(f)(torch.randn(6, 3, 3)))
    assert "'dropout'" in text and "not pointwise" in text and "no random numbers" in text


def test_branch_on_data_is_a_graph_break() -> None:
    def f(x):
        v, out = torch.zeros_like(x[0]), []
        for t in range(len(x)):
            v = v * 0.5 + x[t]
            if v.sum() > 100:
                v = v * 0
            out.append(v)
        return torch.stack(out)

    found = snn_compile.explain(f)(torch.randn(4, 3))
    (graph_break,) = [b for b in found.graph_breaks if "Data-dependent" in b.reason]
    assert "test_explain.py:" in graph_break.location or torch.__version__ < "2.12"  # (its Dynamo names no place)
    assert "Graph breaks" in str(found)


class SummedThreshold(torch.autograd.Function):
    """Its backward sums the gradient of the threshold to its shape, as autograd would have done."""

    @staticmethod
    def forward(ctx, v, threshold):
        ctx.save_for_backward(v - threshold)
        return (v >= threshold).float()

    @staticmethod
    def backward(ctx, gradient):
        (distance,) = ctx.saved_tensors
        found = gradient / (1 + distance.abs()) ** 2
        return found, -found.sum(0)


def test_a_break_inside_of_a_loop_has_its_place() -> None:
    def f(x):
        v, count = torch.zeros_like(x[0]), 0.0
        for t in range(x.shape[0]):
            v = v * 0.5 + x[t]
            count += v.sum().item()
        return v * count

    found = snn_compile.explain(f)(torch.rand(6, 3))
    (only,) = found.graph_breaks
    assert only.location == f"{__file__}:{f.__code__.co_firstlineno + 4}" and "Tensor.item()" in only.reason
    assert "to change: keep numbers as numbers" in str(found)


class ReadsItsClass(torch.autograd.Function):
    """As in the SpyTorch notebooks."""

    scale = 10.0

    @staticmethod
    def forward(ctx, u):
        ctx.save_for_backward(u)
        return (u > 0).float()

    @staticmethod
    def backward(ctx, grad):
        return grad / (ReadsItsClass.scale * ctx.saved_tensors[0].abs() + 1.0) ** 2


def test_breaks_say_what_to_change() -> None:
    def by_class(x):
        v, out = torch.zeros_like(x[0]), []
        for t in range(x.shape[0]):
            v = v * 0.5 + x[t]
            out.append(ReadsItsClass.apply(v - 1.0))
        return torch.stack(out)

    def by_mask(x):
        v, out = torch.zeros_like(x[0]), []
        for t in range(x.shape[0]):
            v = v * 0.5 + x[t]
            v[v > 1.0] = v[v > 1.0] - 1.0
            out.append(v.clone())
        return torch.stack(out)

    def by_tensor(x):
        v, out = torch.zeros_like(x[0]), []
        for t in torch.arange(x.shape[0]):
            v = v * 0.5 + x[t]
            out.append(v)
        return torch.stack(out)

    hints = {
        by_class: "keep the number outside of the class",
        by_mask: "torch.where(mask, v - 1, v)",
        by_tensor: "loop over range(T)",
    }
    for function, hint in hints.items():
        torch._dynamo.reset()
        found = snn_compile.explain(function)(torch.rand(6, 3).requires_grad_(function is by_class))
        assert found.graph_breaks and hint in str(found)


def test_what_dynamo_traces_again_is_counted_once(monkeypatch) -> None:
    """AOTAutograd may ask for another trace when the pipeline has run, with floats as tensors, say."""
    calls, snn = [], backend.snn

    def restarts_once(gm, inputs, **options):
        calls.append(snn(gm, inputs, **options))
        if len(calls) == 1:
            raise torch._dynamo.exc.TensorifyScalarRestartAnalysis(restart_reason="a test")
        return calls[-1]

    monkeypatch.setattr(backend, "snn", restarts_once)
    found = snn_compile.explain(snn_compile.neuron.LIFNode(step_mode="m"))(torch.rand(6, 3))
    assert len(calls) == 2 and found.graphs == 1 and len(found.recurrences) == 1


def test_a_break_that_prepare_leaves_has_its_own_hint() -> None:
    in_library = "/site-packages/snntorch/_neurons/leakyparallel.py:212"
    breaks = {"Attempted to wrap RNN, GRU, or LSTM": "allow_rnn", "Tensor.item() of a threshold": "compat.prepare(model)"}
    for reason, hint in breaks.items():
        assert hint in GraphBreak(reason, in_library).hint


def test_writes_into_the_series_that_is_read_are_named() -> None:
    def f(x, w):
        v, out = torch.zeros_like(x[0]), []
        for t in range(x.shape[0] - 1):
            v = v * 0.5 + x[t]
            x[t + 1] = x[t + 1] + v * w
            out.append(v)
        return torch.stack(out)

    found = snn_compile.explain(f)(torch.rand(20, 3, 5), torch.rand(5))
    assert not found.recurrences and "write whole slices: out[t] = s" in str(found) and "Python number" not in str(found)


def test_a_step_in_a_checkpoint_is_left_alone_with_a_hint() -> None:
    def step(v, x):
        v = v * 0.5 + x
        s = zoo.Sigmoid.apply(v - 1.0, 4.0)
        return v * (1.0 - s), s

    def f(x):
        v, out = torch.zeros_like(x[0]), []
        for t in range(x.shape[0]):
            v, s = checkpoint(step, v, x[t], use_reentrant=False)
            out.append(s)
        return torch.stack(out)

    x = torch.rand(40, 3, 5, requires_grad=True)
    found = snn_compile.explain(f)(x)
    assert not found.recurrences and "call the step without" in str(found)
    assert torch.equal(torch.compile(f, backend="snn")(x), f(x))


def test_a_gradient_that_is_summed_over_the_batch_is_left_alone_with_a_hint() -> None:
    threshold = torch.ones(3, requires_grad=True)

    def f(x):
        v, out = torch.zeros_like(x[0]), []
        for t in range(len(x)):
            v = v * 0.5 + x[t]
            s = SummedThreshold.apply(v, threshold)
            v = v - s
            out.append(s)
        return torch.stack(out)

    found = str(snn_compile.explain(f)(torch.randn(6, 4, 3)))
    assert "invalid gradient" in found and "autograd sums each to its operand's shape" in found


def test_a_sum_of_two_is_no_loop(monkeypatch) -> None:
    """Two residuals, two losses: Inductor fuses them; as a loop, each would be copied into a series first."""

    def f(x):
        a, b = x[0].exp(), x[1].exp()
        h = x[2] * 2
        h = h + a
        return h + b

    found = snn_compile.explain(f)(torch.randn(4, 3))
    assert not found.loops and any("2 steps of 1 ops" in r.reason for r in found.rejections)
    monkeypatch.setattr("snn_compile.lowering.candidates.FEWEST_OPS", 0)
    torch._dynamo.reset()
    assert len(snn_compile.explain(f)(torch.randn(4, 3)).loops) == 1


def test_no_loop_says_what_is_expected() -> None:
    text = str(snn_compile.explain(lambda x: x * 2 + 1)(torch.randn(3)))
    assert "no time loop was compiled" in text and "for t in range" in text and "autograd.Function" in text


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.v = 0.0
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        out = []
        for t in range(x.shape[0]):
            self.v, s = zoo._step(self.v, x[t])
            out.append(s)
        self.calls += 1
        return torch.stack(out)


def test_module_is_left_as_it_was() -> None:
    net = Net()
    state = torch.get_rng_state()
    found = snn_compile.explain(net)(torch.randn(5, 3))
    assert len(found.recurrences) == 1
    assert net.v == 0.0 and net.calls == 0
    torch.set_rng_state(state)


def test_compiled_function_is_reported_and_not_compiled_again() -> None:
    compiles = []

    def counting(gm, example_inputs):
        compiles.append(gm)
        return gm.forward

    def f(x):
        return zoo.lif(x)

    compiled = torch.compile(f, backend=counting)
    x = torch.randn(5, 3)
    expected = compiled(x)
    found = snn_compile.explain(compiled)(x)
    assert len(found.recurrences) == 1
    torch.testing.assert_close(compiled(x), expected, rtol=0, atol=0)
    assert len(compiles) == 1 and not backend.listeners


# ------------------------------------------------------------------------------------------- counters, dump and logs


def test_all_counters_are_there() -> None:
    counters.clear()
    torch.compile(lambda x: x + 1, backend=backend.snn)(torch.randn(3))
    assert {name: counters["snn_compile"][name] for name in counters["snn_compile"]} == dict.fromkeys(COUNTERS, 0)


def test_dump(tmp_path) -> None:
    compiled = torch.compile(lambda x: zoo.lif(x), backend=backend.snn, options={"dump": str(tmp_path)})
    compiled(torch.randn(5, 3, requires_grad=True))
    names = sorted(p.name for p in tmp_path.iterdir())
    assert any("0_dynamo" in n for n in names) and any("distribute" in n for n in names)
    kernels = [p for p in tmp_path.iterdir() if "kernel_loop_0" in p.name]
    assert sorted(p.name.rsplit("_", 1)[1] for p in kernels) == ["backward.cpp", "forward.cpp"]
    assert all("h = v + (x - v)/2" in p.read_text() for p in kernels)


def test_dump_that_cannot_be_written_stops_nothing(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    x = torch.randn(5, 3)
    options = {"dump": str(tmp_path / "file" / "d"), "strict": True}
    got = torch.compile(lambda x: zoo.lif(x), backend=backend.snn, options=options)(x)
    torch.testing.assert_close(got, zoo.lif(x), rtol=0, atol=0)


def test_silent_by_default(capfd) -> None:
    torch.compile(lambda x: zoo.lif(x), backend=backend.snn)(torch.randn(5, 3))
    assert capfd.readouterr() == ("", "")


def test_what_is_compiled_and_refused_is_logged(caplog) -> None:
    with caplog.at_level(logging.INFO, "snn_compile"):
        torch.compile(lambda x: numbers_that_change(x), backend=backend.snn)(torch.randn(6, 3))
        torch.compile(lambda x: zoo.lif(x), backend=backend.snn)(torch.randn(5, 3))
    assert "left alone" in caplog.text and "zoo.py" in caplog.text and "5 steps, cpp" in caplog.text


# ------------------------------------------------------------------------------------------ the loop that is outside


def run_steps(feed_back: bool, steps: int = 8) -> list[str]:
    def step(x, v):
        v, s = zoo._step(v, x)
        return s, v

    compiled = torch.compile(step, backend=backend.snn)
    v = torch.zeros(5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            _, new = compiled(torch.randn(5), v)
            v = new if feed_back else torch.zeros(5)
    return [str(w.message) for w in caught if "snn_compile" in str(w.message)]


def test_loop_outside_warns_once() -> None:
    found = run_steps(feed_back=True, steps=12)
    assert len(found) == 1 and "Compile the function that contains the loop" in found[0]


def test_state_that_does_not_come_back_does_not_warn() -> None:
    assert run_steps(feed_back=False) == []


def test_loop_inside_does_not_warn() -> None:
    def run(x, v):
        out = []
        for t in range(4):
            v, s = zoo._step(v, x[t])
            out.append(s)
        return torch.stack(out), v

    compiled = torch.compile(run, backend=backend.snn)
    v = torch.zeros(5)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="snn_compile")
        for _ in range(6):
            _, v = compiled(torch.randn(4, 5), v)


def test_kernels_of_a_batch_norm_in_the_potential_are_those_that_run() -> None:
    """One a direction, for all steps; and what was only read is not what runs afterwards."""
    node, x = snn_compile.neuron.MPBNLIFNode(out_channels=3, step_mode="m"), torch.randn(5, 4, 3, 4, 4)
    found = snn_compile.explain(node, step_from=2)(x.clone().requires_grad_())
    assert [direction for _, direction, _ in found.kernels] == ["forward", "backward"]
    assert all("all steps of a channel at a time" in text for _, _, text in found.kernels)
    compiled = torch.compile(copy.deepcopy(node), backend="snn", options={"step_from": 2})
    assert torch.equal(compiled(x), node(x))


def test_states_are_listed_by_the_names_of_the_equations() -> None:
    def two_of_one_name(x):
        states, out = [torch.zeros_like(x[0]), torch.zeros_like(x[0])], []
        for t in range(x.shape[0]):
            for i, decay in enumerate((0.5, 0.9)):
                v = states[i] * decay + x[t]
                s = (v >= 1.0).float()
                states[i] = v - s
                out.append(s)
        return torch.stack(out)

    found = snn_compile.explain(two_of_one_name)(torch.randn(6, 4))
    (recurrence,) = found.recurrences
    names = operand_names(recurrence)[: len(recurrence.carries)]
    assert len(set(names)) == len(names) == 2
    assert f"states       {', '.join(names)}\n" in str(found)
    assert all(f"{name}' = " in str(found) for name in names)

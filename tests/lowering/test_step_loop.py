"""The steps in C++: their results are those of the steps in Python bit for bit, and forward eager's."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from snn_compile.lowering import step_loop
from snn_compile.lowering.cpp import interpreter
from snn_compile.lowering.step_runner import StepRunner
from tests.passes.capture import Spike

pytestmark = pytest.mark.usefixtures("op_by_op")


@pytest.fixture
def loops(fresh, monkeypatch):
    """The lengths of the runs in C++."""
    found: list[int] = []
    run = step_loop.StepLoop.run

    def spy(self, values, states, steps, order):
        found.append(len(order))
        return run(self, values, states, steps, order)

    monkeypatch.setattr(step_loop.StepLoop, "run", spy)
    return found


def fire(h):
    s = Spike.apply(h - 1.0)
    return s, h * (1.0 - s)


def before_charge(x, w, b, v):
    s, out = torch.zeros_like(v), []
    for t in range(x.shape[0]):
        s, v = fire(0.9 * v + x[t] + F.linear(s, w, b))
        out.append(s)
    return torch.stack(out), v


def after_fire(x, w, b, v):
    feedback, out = torch.zeros_like(v), []
    for t in range(x.shape[0]):
        s, v = fire(0.9 * v + x[t] + feedback)
        feedback = s @ w
        out.append(s * b)
    return torch.stack(out), feedback


def masked_diagonal(x, w, b, v):
    mask, s, out = 1.0 - torch.eye(w.shape[0], dtype=w.dtype), torch.zeros_like(v), []
    for t in range(x.shape[0]):
        s, v = fire(torch.sigmoid(b) * v + x[t] + s @ (w * mask))
        out.append(s)
    return torch.stack(out, 1), s


def by_groups(x, w, b, v):
    feedback, out = torch.zeros_like(v), []
    for t in range(x.shape[0]):
        s, v = fire(0.9 * v + x[t] + feedback)
        feedback = torch.bmm(s.view(v.shape[0], -1, 3).transpose(0, 1), w[:3, :3].expand(v.shape[1] // 3, 3, 3))
        feedback = feedback.transpose(0, 1).reshape(v.shape) + b
        out.append(v)
    return torch.stack(out), v


def beside_the_input(x, w, b, v):
    s, out = torch.zeros_like(v), []
    for t in range(x.shape[0]):
        s, v = fire(0.9 * v + F.linear(torch.cat((x[t], s), -1), torch.cat((w, w), 1), b))
        out.append(s)
    return torch.stack(out), s


def two_steps_late(x, w, b, v):
    """A state that another one was: its value lives longer than a step."""
    s = before = torch.zeros_like(v)
    out = []
    for t in range(x.shape[0]):
        late, before = before, s
        s, v = fire(0.9 * v + x[t] + late @ w + b)
        out.append(late)
    return torch.stack(out), before


def two_layers(x, w, b, v):
    s = u = z = torch.zeros_like(v)
    out = []
    for t in range(x.shape[0]):
        s, v = fire(0.9 * v + x[t] + z @ w)
        z, u = fire(0.8 * u + F.linear(s, w, b))
        out.append(z)
    return torch.stack(out), u


def backwards_in_time(x, w, b, v):
    s, out = torch.zeros_like(v), []
    for t in reversed(range(x.shape[0])):
        s, v = fire(0.9 * v + x[t] + F.linear(s, w, b))
        out.append(s)
    return torch.stack(out[::-1]), v


FORMS = [before_charge, after_fire, masked_diagonal, by_groups, beside_the_input, two_steps_late, two_layers, backwards_in_time]


@dataclass(frozen=True)
class Size:
    steps: int = 9
    rows: int = 5
    lanes: int = 9
    dtype: torch.dtype = torch.float32
    arrange: Callable[[list[torch.Tensor]], list[torch.Tensor]] = lambda tensors: tensors


def operands(size: Size):
    x, w = torch.rand(size.steps, size.rows, size.lanes), torch.randn(size.lanes, size.lanes) * 0.5
    b, v = torch.randn(size.lanes) * 0.1, torch.rand(size.rows, size.lanes)
    return [o.to(size.dtype).requires_grad_() for o in size.arrange([x, w, b, v])]


def run(function, given):
    results = function(*given)
    weights = [torch.linspace(-1, 1, r.numel(), dtype=r.dtype).view(r.shape) for r in results]
    loss = sum((r * w).sum() for r, w in zip(results, weights, strict=True))
    return [r.detach() for r in results], torch.autograd.grad(loss, given)


def check(form, size: Size, monkeypatch) -> None:
    given = operands(size)
    compiled = torch.compile(form, backend="snn", fullgraph=True, options={"strict": True, "step_from": 2})
    expected, gradients = run(form, given)
    in_cpp = [run(compiled, given) for _ in range(2)]  # (the first call has found the instructions, the second has them)
    with monkeypatch.context() as patch:
        patch.setattr(StepRunner, "loop", property(lambda self: None), raising=False)
        results, found = run(compiled, given)
    for ours, ours_gradients in in_cpp:
        assert all(torch.equal(a, b) for a, b in zip(results, ours, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(found, ours_gradients, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(expected, results, strict=True))
    for a, b in zip(gradients, found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5 * float(a.abs().max()))


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.__name__)
def test_form(loops, monkeypatch, form):
    check(form, Size(), monkeypatch)
    # of nine steps, the first two and the last one, then the first and the last, in Python (and what was peeled off the loop)
    assert loops in ([6, 6, 7, 7], [5, 5, 6, 6])


def strided(tensors):
    x, w, b, v = tensors
    return [x.transpose(0, 1).contiguous().transpose(0, 1), w.t(), b.repeat_interleave(2)[::2], v.t().contiguous().t()]


SIZES = {
    "one row": Size(rows=1),
    "many rows": Size(steps=5, rows=300, lanes=120),
    "fp64": Size(dtype=torch.float64),
    "other layouts": Size(arrange=strided),
}


@pytest.mark.parametrize("form", [before_charge, by_groups, two_steps_late], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", SIZES)
def test_size(loops, monkeypatch, form, name):
    check(form, SIZES[name], monkeypatch)


@pytest.mark.parametrize("steps", [2, 3, 4, 5])
def test_short(loops, monkeypatch, steps):
    check(before_charge, Size(steps=steps), monkeypatch)
    inner = [n for n in (steps - 3, steps - 3, steps - 2, steps - 2) if n > 0]
    assert loops == (inner if steps > 3 else [])


@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_threads(loops, monkeypatch, threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        check(before_charge, Size(rows=260, lanes=129), monkeypatch)
    finally:
        torch.set_num_threads(before)
    assert loops


def test_without_gradients(loops):
    given = operands(Size())
    compiled = torch.compile(before_charge, backend="snn", options={"step_from": 2})
    with torch.no_grad():
        pairs = list(zip(before_charge(*given), compiled(*given), strict=True))
    assert loops == [6] and all(torch.equal(a, b) for a, b in pairs)


def convolved(x, w, b, v):
    s, out = torch.zeros_like(v), []
    for t in range(x.shape[0]):
        s, v = fire(0.9 * v + x[t] + F.conv1d(s[:, None], w[:1, None, :3], b[:1], padding=1)[:, 0])
        out.append(s)
    return torch.stack(out), v


def of_another_size(x, w, b, v):
    """A sum in the step: no product, no view."""
    s, out = torch.zeros_like(v), []
    for t in range(x.shape[0]):
        s, v = fire(0.9 * v + x[t] + (s @ w + b).mean(-1, keepdim=True))
        out.append(s)
    return torch.stack(out), v


@pytest.mark.parametrize("form", [convolved, of_another_size], ids=lambda f: f.__name__)
def test_what_has_no_instruction_stays_in_python(loops, monkeypatch, form):
    check(form, Size(), monkeypatch)
    assert not loops


def test_torch_without_the_c_functions(loops, monkeypatch):
    monkeypatch.setattr(interpreter, "torch_functions", lambda: None)
    check(before_charge, Size(lanes=6), monkeypatch)
    assert not loops


def test_this_torch_has_the_c_functions():
    assert interpreter.torch_functions() is not None


def turned(x, w, b, v):
    """The states of all steps but the first lie in memory in another way than the initial one."""
    c, out = v, []
    for t in range(x.shape[0]):
        c = 0.2 * c + x[t] + 0.1 * (c @ w) + b
        out.append(c)
        c = c.t()
    return torch.stack(out), c


def test_a_state_that_is_turned(loops):
    torch.manual_seed(0)
    x, w, b, v = torch.randn(40, 8, 8), torch.randn(8, 8), torch.randn(8), torch.randn(8, 8)
    inputs = [i.requires_grad_() for i in (x, w, b, v)]
    got, expected = torch.compile(turned, backend="snn")(*inputs), turned(*inputs)
    assert all(map(torch.equal, got, expected)) and loops
    grads = [torch.autograd.grad(out.sum() + c.square().sum(), inputs) for out, c in (got, expected)]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)

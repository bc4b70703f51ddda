import pytest
import torch
import torch.nn.functional as F

from snn_compile.errors import Rejection
from snn_compile.passes.batch_time import why_no_layers
from snn_compile.passes.reroll import reroll
from tests.passes.capture import Spike, capture, infos, reroll_all, rerolled, x


def leaky(a):
    v, out = torch.zeros_like(a[0]), []
    for t in range(a.shape[0]):
        v = 0.5 * v + a[t]
        out.append(v)
    return torch.stack(out)


def backwards(a):
    v, out = torch.zeros_like(a[0]), []
    for t in reversed(range(a.shape[0])):
        v = 0.5 * v + a[t]
        out.append(v)
    return torch.stack(out, -1)


def next_input(a):
    v = torch.zeros_like(a[0])
    for t in range(a.shape[0] - 1):
        v = 0.5 * v + a[t] - 0.1 * a[t + 1]
    return v


def two_steps_ago(a):
    v, before, out = torch.zeros_like(a[0]), torch.zeros_like(a[0]), []
    for t in range(a.shape[0]):
        v, before = 0.5 * v + 0.2 * before + a[t], v
        out.append(v)
    return torch.stack(out), before


def two_loops_of_different_lengths(a):
    v = w = torch.zeros_like(a[0])
    for t in range(a.shape[0]):
        v = 0.5 * v + a[t]
    for t in range(4):
        w = 0.25 * w - a[t] * v
    return v, w


def dead_tail(a):
    v, s = torch.zeros_like(a[0]), torch.zeros_like(a[0])
    out = []
    for t in range(a.shape[0]):
        v = 0.5 * v * (1.0 - s) + a[t]
        s = Spike.apply(v - 1.0)
        out.append(v)
    return torch.stack(out)


def new_axes(a):
    """(Time is the middle dim.)"""
    u, v, w = torch.zeros(6, 5, 1), torch.zeros(1, 6, 5), torch.zeros(6, 1, 5)
    for t in range(a.shape[1]):
        u = 0.5 * u + a[:, t, :, None]
        v = 0.5 * v + a[None, :, t]
        w = 0.5 * w + a[..., None, t, :]
    return u, v, w


def read_before_the_loop(a):
    """The first state is read as an item, like a function's result at the end of an iteration: none begins there."""
    s, out = torch.zeros(1, *a.shape[1:])[0], []
    for t in range(a.shape[0]):
        s = Spike.apply(a[t] + s)
        out.append(s)
    return torch.stack(out)


def the_stack_is_written_into(a):
    """Memory of its own, which values of single steps do not share."""
    v, out = torch.zeros_like(a[0]), []
    for t in range(a.shape[0]):
        v = 0.5 * v + a[t]
        out.append(v)
    y = torch.stack(out)
    y[0].add_(1.0)
    return y, out[0], out[1]


def a_step_is_written_into(a):
    v, out = torch.zeros_like(a[0]), []
    for t in range(a.shape[0]):
        v = 0.5 * v + a[t]
        out.append(v * 2.0)
    y = torch.stack(out)
    out[0][1].add_(1.0)
    return y, out[0]


def used_one_by_one(a):
    v, total = torch.zeros_like(a[0]), 0.0
    for t in range(a.shape[0]):
        v = 0.5 * v + a[t]
        total = total + v.sum() * (t == 2)
    return total


def every_second_slice(a):
    v = torch.zeros_like(a[0])
    for t in range(0, a.shape[0], 2):
        v = 0.5 * v + a[t]
    return v


def a_first_value_is_made_as_later_ones_are(a):
    v, other = (a[0] * 0.25).clone(), (a[1] * 0.5).clone()
    out = []
    for t in range(a.shape[0]):
        h = v * 0.5 + a[t]
        s = Spike.apply(h - 1.0)
        v = (h - s).clone()
        out.append(s)
    return torch.stack(out), torch.stack([v, other])


def test_what_looks_like_a_first_value_but_is_not_is_outside():
    loops = rerolled(a_first_value_is_made_as_later_ones_are, x()).loops()
    assert [(loop.length, len(loop.carries)) for _, loop in loops if loop.carries] == [(6, 1)]


LOOPS = {
    leaky: [6],
    backwards: [6],
    next_input: [5],
    two_steps_ago: [6],
    two_loops_of_different_lengths: [4, 6],
    dead_tail: [6],
    read_before_the_loop: [6],
    new_axes: [3],
}


@pytest.mark.parametrize("function", LOOPS, ids=lambda f: f.__name__)
def test_loops(function):
    captured = rerolled(function, x())
    lengths = sorted(loop.length for _, loop in captured.loops() if loop.carries)
    assert lengths == LOOPS[function]


@pytest.mark.parametrize("function", [used_one_by_one, every_second_slice, the_stack_is_written_into], ids=lambda f: f.__name__)
def test_what_is_found_means_the_same(function):
    capture(function, x()).check(reroll_all)


# ------------------------------------------------------------------------------------------------------------ near misses


def number_changes(a):
    v = torch.zeros_like(a[0])
    for t in range(a.shape[0]):
        v = 0.9 * v + a[t] ** t
    return v


def one_step_is_another(a):
    v = torch.zeros_like(a[0])
    for t in range(a.shape[0]):
        v = 0.5 * v + (a[t].abs() if t == 3 else a[t].neg())
    return v


def slices_out_of_order(a):
    v = torch.zeros_like(a[0])
    for t in (0, 2, 1, 5, 3, 4):
        v = 0.5 * v + a[t]
    return v


def weights_differ(a):
    weights = [torch.full((5,), float(i)) for i in range(6)]
    v = torch.zeros_like(a[0])
    for t in range(a.shape[0]):
        v = 0.5 * v + a[t] * weights[5 - t if t % 2 else t]
    return v


def state_changes_dtype(a):
    v = torch.zeros(3, 5, dtype=torch.int64)
    for t in range(a.shape[0]):
        v = 0.5 * v + a[t]
    return v


def a_tree_is_no_chain(a):
    level = [a[t] for t in range(6)]
    return (level[0] + level[1]) * (level[2] + level[3]) * (level[4] + level[5])


NEAR_MISSES = {
    a_step_is_written_into: "written into after the loop",
    number_changes: "a Python number changes",
    slices_out_of_order: "",
    one_step_is_another: "",
    weights_differ: "",
    a_tree_is_no_chain: "",
    state_changes_dtype: "",
}


@pytest.mark.parametrize("function", NEAR_MISSES, ids=lambda f: f.__name__)
def test_near_miss(function):
    """No loop over all the steps; what is found means the same; and the reason is given."""
    captured = capture(function, x())
    loops, rejections = captured.check(reroll_all)
    assert all(loop.length < 6 or not loop.carries for loop in loops)
    if not loops:
        assert rejections
    assert not NEAR_MISSES[function] or any(NEAR_MISSES[function] in r.reason for r in rejections)


def test_too_few_steps():
    captured = capture(leaky, x(3))
    loops, _ = captured.check(lambda gm: reroll_all(gm, min_steps=4))
    assert not loops


def test_a_refused_loop_leaves_the_graph_alone():
    from snn_compile.passes.functionalize import functionalize
    from snn_compile.passes.hoist_creations import hoist_creations

    captured = capture(leaky, x())
    functionalize(captured.gm)
    hoist_creations(captured.gm)
    before = str(captured.gm.graph)
    loops, rejections = captured.check(lambda gm: reroll(gm, lambda loop: Rejection("not today")))
    assert not loops and any(r.reason == "not today" for r in rejections)
    assert str(captured.gm.graph) == before


def layer_by_layer(a, w):
    """A loop of a layer behind that of a neuron, one of another layer behind it, and what is no layer of all steps."""
    v, out = torch.zeros_like(a[0]), []
    for t in range(a.shape[0]):
        v = 0.5 * v + a[t]
        out.append(v)
    normed = [F.layer_norm(o, (4,)) for o in out]
    read = [F.linear(p, w) for p in normed]
    separate = [F.linear(p, w) for p in (a[1].sin(), a[2].cos(), a[3].exp())]
    dropped = [F.dropout(F.linear(p, w), 1e-30) for p in normed]
    return torch.stack(read), separate, dropped


@pytest.mark.parametrize("accepts_layers", [True, False])
def test_layers_of_all_steps(accepts_layers):
    captured = capture(layer_by_layer, x(6, 3, 4), torch.randn(5, 4))

    def layers(loop):
        return why_no_layers(loop, infos(loop))

    def neurons(loop):
        return None if loop.carries else Rejection("no neuron")

    loops, _ = captured.check(lambda gm: reroll(gm, neurons, 2, layers if accepts_layers else None))
    held = sorted(str(getattr(n.target, "__name__", n.target)) for loop in loops if not loop.carries for n in infos(loop))
    assert held == (["layer_norm", "linear"] if accepts_layers else [])
    assert sum(n.target is F.linear for n in captured.gm.graph.nodes) == (9 if accepts_layers else 15)

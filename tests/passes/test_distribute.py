import torch
import torch.nn.functional as F

from snn_compile.passes.distribute import distribute, find_groups
from snn_compile.passes.hoist import hoist
from tests.passes.capture import Captured, Spike, capture, infos, reroll_all, rerolled, x


def split(captured: Captured) -> list[bool]:
    """Distribute the only loop; which of the new loops are kernels, in order."""

    def rewrite(gm):
        ((call, loop),) = captured.loops()
        return distribute(gm, call, loop, infos(loop))

    calls = captured.check(rewrite, rtol=1e-6)
    return [loop.is_kernel for _, loop in calls]


def two_layers(a, w):
    v = u = torch.zeros_like(a[0])
    out = []
    for t in range(a.shape[0]):
        v = 0.5 * v + F.linear(a[t], w)
        s = Spike.apply(v - 0.5)
        v = v * (1.0 - s)
        u = 0.9 * u + F.linear(s, w)
        out.append(u)
    return torch.stack(out)


def test_layers_and_neurons_are_loops_of_their_own():
    captured = rerolled(two_layers, x(), torch.randn(5, 5))
    assert split(captured) == [False, True, False, True]


def pointwise_neighbours(a):
    v, total = torch.zeros_like(a[0]), 0.0
    for t in range(a.shape[0]):
        v = 0.5 * v + (a[t] * 2.0 + 1.0)
        total = total + torch.relu(v) * 3.0
    return total


def test_pointwise_neighbours_join_the_recurrence():
    assert split(rerolled(pointwise_neighbours, x())) == [True]


def coupled_by_a_matmul(a, w):
    v = torch.zeros_like(a[0])
    for t in range(a.shape[0]):
        v = 0.5 * v + a[t] + F.linear(v, w)
    return v


def test_near_miss_a_matmul_in_the_state():
    captured = rerolled(coupled_by_a_matmul, x(), torch.randn(5, 5) * 0.1)
    ((_, loop),) = captured.loops()
    groups = find_groups(loop, infos(loop))
    assert not any(g.is_kernel for g in groups) and any(g.recurrent for g in groups)


def shared_statistics(a, mean, var):
    v = torch.zeros_like(a[0])
    for t in range(a.shape[0]):
        y = F.batch_norm(a[t], mean, var, training=True)
        y = F.batch_norm(y * 2.0, mean, var, training=True)
        v = 0.5 * v + y
    return v


def test_two_writers_of_the_same_statistics_stay_together():
    captured = capture(shared_statistics, x(), torch.zeros(5), torch.ones(5))
    captured.check(reroll_all)
    split(captured)
    homes = [i for i, (_, loop) in enumerate(captured.loops()) for n in loop.body.graph.nodes if n.target is F.batch_norm]
    assert len(homes) == 2 and len(set(homes)) == 1


def static_encoder(a, w):
    v = torch.zeros_like(a[0])
    for _ in range(6):
        v = 0.5 * v + F.linear(a[0], w).relu()
    return v


def test_invariant_work_is_hoisted_once():
    captured = rerolled(static_encoder, x(), torch.randn(5, 5))

    def rewrite(gm):
        ((call, loop),) = captured.loops()
        return hoist(gm, call, loop, infos(loop))

    assert captured.check(rewrite) >= 1
    assert captured.targets().count(F.linear) == 1
    ((_, loop),) = captured.loops()
    assert F.linear not in [n.target for n in loop.body.graph.nodes]


def test_near_miss_a_random_op_is_not_hoisted():
    def function(a):
        v = torch.zeros_like(a[0])
        for _ in range(6):
            v = 0.5 * v + F.dropout(a[0], 0.5)
        return v

    captured = capture(function, x())
    reroll_all(captured.gm)
    ((call, loop),) = captured.loops()
    hoist(captured.gm, call, loop, infos(loop))
    assert F.dropout in [n.target for n in loop.body.graph.nodes]

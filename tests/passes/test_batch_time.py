import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

from snn_compile.backend import snn
from snn_compile.errors import Reject
from snn_compile.passes.batch_time import batch_time
from snn_compile.passes.distribute import distribute
from snn_compile.passes.unroll import unroll
from snn_compile.passes.vmap_time import vmap_time
from tests.passes.capture import Captured, capture, infos, reroll_all, x


def batch_all(captured: Captured, rtol: float = 1e-5) -> list[str]:
    """Distribute and batch; the reasons of those that stay per step."""
    captured.check(reroll_all)
    reasons = []

    def rewrite(gm):
        for call, loop in captured.loops():
            distribute(gm, call, loop, infos(loop))
        for call, loop in captured.loops():
            if not loop.is_kernel:
                try:
                    batch_time(gm, call, loop, infos(loop))
                except Reject as reject:
                    reasons.append(reject.rejection.reason)

    captured.check(rewrite, rtol)
    return reasons


def over_time(layer):
    def function(a, *weights):
        v, out = 0.0, []
        for t in range(a.shape[0]):
            v = 0.5 * v + layer(a[t], *weights)
            out.append(v)
        return torch.stack(out)

    return function


LAYERS = {
    "linear": (lambda a, w, b: F.linear(a, w, b), x(), torch.randn(4, 5), torch.randn(4)),
    "conv2d": (lambda a, w: F.conv2d(a, w, padding=1), x(6, 2, 3, 8, 8), torch.randn(4, 3, 3, 3)),
    "pool": (lambda a: F.avg_pool2d(F.max_pool2d(a, 2), 2).flatten(1), x(6, 2, 3, 8, 8)),
    "pool, 1-d": (lambda a, w: F.avg_pool1d(torch.conv_transpose1d(a, w), 2), x(6, 2, 3, 8), torch.randn(3, 4, 2)),
    "pool, 3-d": (
        lambda a, w: F.max_pool3d(F.avg_pool3d(torch.conv_transpose3d(a, w), 2), 2),
        x(6, 2, 3, 8, 8, 8),
        torch.randn(3, 2, 1, 1, 1),
    ),
    "view that changes nothing": (lambda a, w: F.linear(a.view(a.shape[0], -1), w), x(), torch.randn(4, 5)),
    "expand that changes nothing": (lambda a, w: F.linear(a.expand(2, 5), w), x(6, 2, 5), torch.randn(4, 5)),
    "broadcast_to": (lambda a, w: F.linear(torch.broadcast_to(a, (2, 5)), w).broadcast_to(2, 4), x(6, 2, 1), torch.randn(4, 5)),
    "expand_as": (lambda a, w, b: F.linear(a.expand_as(b), w), x(6, 2, 1), torch.randn(4, 5), torch.randn(2, 5)),
    "reshape behind the batch": (lambda a, w: F.linear(a.reshape(2, -1), w), x(6, 2, 3, 4), torch.randn(5, 12)),
    "unflatten": (lambda a, w: F.linear(a, w).unflatten(1, (2, -1)).flatten(1), x(), torch.randn(4, 5)),
    "layer_norm": (lambda a: F.layer_norm(a, (5,)), x()),
    "softmax": (lambda a: F.softmax(a, dim=-1), x()),
    "attention": (lambda a: F.scaled_dot_product_attention(a, a, a), x(6, 2, 3, 8, 4)),
    "batch_norm, eval": (lambda a, m, v: F.batch_norm(a, m, v), x(), torch.randn(5), torch.rand(5) + 0.5),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer_runs_once(name):
    layer, *inputs = LAYERS[name]
    captured = capture(over_time(layer), *inputs)
    reasons = batch_all(captured)
    assert not reasons
    assert all(loop.is_kernel for _, loop in captured.loops())


def test_layers_stacked_along_the_last_dim_are_laid_out_as_eager_does():
    def function(a, w):
        return torch.stack([F.linear(a[t], w) for t in range(6)], -1).view(3, -1)

    assert not batch_all(capture(function, x(), torch.randn(4, 5)))


#: Steps that do something else with their batch, and the op that all of them become.
BY_VMAP = {
    "einsum": (lambda a, w: torch.einsum("bi,ji->bj", a, w), "bmm", x(), torch.randn(5, 5)),
    "matmul": (lambda a, w: a @ w, "mm", x(), torch.randn(5, 5)),
    "batched matmul": (lambda a: (a @ a.transpose(-2, -1)).softmax(-1) @ a, "bmm", x(6, 2, 3, 4)),
    "view of another batch": (lambda a: a.view(6, -1) * 1.0, "view", x(6, 2, 3, 4)),
    "permute and reshape": (lambda a: a.permute(0, 2, 1).reshape(2, -1), "permute", x(6, 2, 3, 4)),
    "mean over space": (lambda a: a.mean((2, 3)), "mean", x(6, 2, 3, 4, 4)),
    "sum over the batch": (lambda a: a + a.sum(0, keepdim=True), "sum", x()),
    "cumsum over the batch": (lambda a: a.cumsum(0), "cumsum", x()),
    "softmax over the batch": (lambda a: F.softmax(a, dim=0), "_softmax", x()),
    "embedding": (lambda a, w: F.embedding((a > 0).long(), w).sum(-1), "embedding", x(), torch.randn(2, 4)),
    "topk": (lambda a: a.topk(2, -1)[0], "topk", x()),
    "normalise": (lambda a: F.normalize(a, dim=1), "linalg_vector_norm", x()),
    "interpolate": (lambda a: F.interpolate(a, scale_factor=2), "upsample_nearest2d", x(6, 2, 3, 4, 4)),
    "convolution to features": (lambda a, w: F.conv2d(a, w).sum(0), "sum", x(6, 2, 3, 8, 8), torch.randn(4, 3, 3, 3)),
}


@pytest.mark.parametrize("name", BY_VMAP)
def test_step_runs_once_by_vmap(name):
    layer, op, *inputs = BY_VMAP[name]
    captured = capture(over_time(layer), *inputs)
    assert not batch_all(captured)
    assert all(loop.is_kernel for _, loop in captured.loops())
    names = [t._schema.name.removeprefix("aten::") for t in captured.targets() if isinstance(t, torch._ops.OpOverload)]
    assert 1 <= names.count(op) <= 2, names


def test_what_vmap_batches_stays_detached():
    """Below autograd a `detach` is just a view, and vmap may write down another one in its place."""

    def function(a):
        return torch.stack([a[t] * a[t].sum(0).detach() for t in range(a.shape[0])])

    captured = capture(function, x())
    captured.check(reroll_all)
    ((call, loop),) = captured.loops()
    vmap_time(captured.gm, call, loop)
    assert torch.ops.aten.detach.default in captured.targets()


def test_what_vmap_makes_for_all_steps_is_written_into_by_each(fresh):
    """``zeros(N)`` without a batch dim becomes ``zeros(N).expand(T, N)``, into which Inductor adds the steps on each other."""
    places = torch.tensor([0, 2, 1, 0, 3])

    def function(a):
        v, out = torch.zeros(4), []
        for t in range(a.shape[0]):
            total = torch.zeros(4).index_add(0, places, a[t].sum(0)) + torch.zeros(4).index_put(
                (places,), a[t, 0], accumulate=True
            )
            v = v * 0.5 + total
            v = v - (v > 1.0).float()
            out.append(v)
        return torch.stack(out)

    given = x()
    with torch.no_grad():
        got = torch.compile(function, backend=snn)(given)
        assert torch.equal(got, function(given)) and counters["snn_compile"]["ops_time_batched"] > 0


def test_reversed_time():
    def function(a, w):
        v, out = torch.zeros(3, 4), []
        for t in range(a.shape[0]):
            v = 0.5 * v + F.linear(a[a.shape[0] - 1 - t], w)
            out.append(v)
        return torch.stack(out[::-1])

    captured = capture(function, x(), torch.randn(4, 5))
    assert not batch_all(captured)
    assert all(loop.is_kernel for _, loop in captured.loops())


def test_reversed_time_that_stays_per_step():
    """The series is not turned twice, once for all steps and once by each."""

    def function(a):
        v, out = torch.zeros(3, 5), []
        for t in reversed(range(a.shape[0])):
            v = 0.5 * v + torch.histc(a[t], 5)
            out.append(v)
        return torch.stack(out)

    captured = capture(function, x())
    assert any("histc" in r for r in batch_all(captured))
    calls = captured.loops()
    assert any(series.reverse for _, loop in calls for series in loop.xs if not loop.is_kernel)
    captured.check(lambda gm: [unroll(gm, call, loop) for call, loop in calls if not loop.is_kernel])


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_in_training_keeps_statistics_per_step(affine):
    weights = [torch.rand(5) + 0.5, torch.randn(5)] if affine else []

    def layer(a, mean, var, *weights):
        return F.batch_norm(a, mean, var, *weights, training=True, momentum=0.3)

    captured = capture(over_time(layer), x(6, 8, 5), torch.zeros(5), torch.ones(5), *weights)
    assert not batch_all(captured)  # (`check` compares the running statistics too: they are inputs that are written)
    assert F.batch_norm not in captured.targets() and torch.var_mean in captured.targets()


def test_batch_norm_without_running_statistics():
    captured = capture(over_time(lambda a: F.batch_norm(a, None, None, training=True)), x(6, 8, 5))
    batch_all(captured)


def test_dropout_draws_all_masks_at_once():
    captured = capture(over_time(lambda a: F.dropout(a, 0.5)), x(6, 40, 50))
    reroll_all(captured.gm)
    for call, loop in captured.loops():
        distribute(captured.gm, call, loop, infos(loop))
    for call, loop in captured.loops():
        if not loop.is_kernel:
            batch_time(captured.gm, call, loop, infos(loop))
    assert captured.targets().count(F.dropout) == 1
    captured.gm.recompile()
    (y,), _, _ = captured.run()
    first = y[1] - 0.5 * y[0]  # the dropped input of step 1
    assert 0.4 < float((first == 0).float().mean()) < 0.6


NEAR_MISSES = {
    "no batching rule": (lambda a: torch.histc(a, 5) + a, "'histc' is not known to treat its first dim as a batch; torch.vmap: "),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss(name):
    layer, reason = NEAR_MISSES[name]
    captured = capture(over_time(layer), x())
    assert any(reason in r for r in batch_all(captured))


def test_near_miss_two_batch_norms_of_one_pair_of_statistics():
    def layer(a, mean, var):
        y = F.batch_norm(a, mean, var, training=True)
        return F.batch_norm(y * 2.0 + 1.0, mean, var, training=True)

    captured = capture(over_time(layer), x(6, 8, 5), torch.zeros(5), torch.ones(5))
    assert any("in turn" in r for r in batch_all(captured))

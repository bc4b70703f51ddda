import torch
import torch.nn.functional as F

from tests.passes.capture import Spike, infos, rerolled, x


def step_of_everything(a, w, mean, var):
    v, out = torch.zeros_like(a[0]), []
    for t in range(a.shape[0]):
        y = F.linear(a[t], w)
        y = F.batch_norm(y, mean, var, training=True)
        y = F.dropout(y, 0.5)
        v = 0.5 * v + y
        out.append(Spike.apply(v - 1.0))
    return torch.stack(out)


def test_what_each_op_may_do():
    torch.manual_seed(0)
    from tests.passes.capture import capture, reroll_all

    captured = capture(step_of_everything, x(), torch.randn(5, 5), torch.zeros(5), torch.ones(5))
    loops, _ = reroll_all(captured.gm)
    found = {getattr(n.target, "__name__", str(n.target)): i for n, i in infos(loops[0]).items()}
    assert found["mul"].pointwise and found["add"].pointwise
    assert not found["linear"].pointwise and found["linear"].pure
    assert found["batch_norm"].writes and not found["batch_norm"].pure
    assert not found["dropout"].pure and not found["dropout"].writes
    assert found["autograd_function_apply"].pointwise


def test_a_reduction_is_not_pointwise():
    def function(a):
        v = torch.zeros_like(a[0])
        for t in range(a.shape[0]):
            v = 0.5 * v + a[t] - v.mean(-1, keepdim=True)
        return v

    ((_, loop),) = rerolled(function, x()).loops()
    assert [n.target for n, i in infos(loop).items() if not i.pointwise] == ["mean"]

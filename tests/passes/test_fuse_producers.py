import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

from snn_compile.backend import snn


class Net(nn.Module):
    """Convolution and batch norm over all steps at once, and a neuron, in multi-step form."""

    def __init__(self, split="unflatten", affine=True, read_twice=False):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6, affine=affine)
        self.split, self.read_twice = split, read_twice
        with torch.no_grad():
            self.norm.running_mean.normal_()
            self.norm.running_var.uniform_(0.3, 2.0)
            if affine:
                self.norm.weight.normal_()
                self.norm.bias.normal_()

    def forward(self, x):
        steps, batch = x.shape[:2]
        y = self.norm(self.conv(x.flatten(0, 1)))
        z = y.unflatten(0, (steps, batch)) if self.split == "unflatten" else y.view(steps, batch, *y.shape[1:])
        v, out = 0.0, []
        for t in range(steps):
            h = 0.5 * v + z[t]
            s = (h >= 0.5).to(h.dtype)
            v = h * (1.0 - s)
            out.append(s)
        spikes = torch.stack(out)
        return (spikes, y) if self.read_twice else spikes


def run(net, x):
    with torch.no_grad():
        expected = net(x)
        got = torch.compile(net, backend=snn)(x)
    for a, b in zip((expected,) if torch.is_tensor(expected) else expected, (got,) if torch.is_tensor(got) else got, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=0 if b is got or b is got[0] else 1e-5)
        assert float(a.float().std()) > 0.0
    return counters["snn_compile"]["producers_fused"], counters["snn_compile"]["batch_norms_folded"]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("split", ["unflatten", "view"])
def test_batch_norm_moves_in(split, affine, layout, fresh):
    net = Net(split, affine).eval().to(memory_format=layout)
    x = torch.randn(4 * 3, 2, 9, 8).contiguous(memory_format=layout).unflatten(0, (4, 3))
    assert run(net, x) == (1, 1)


def test_near_miss_read_elsewhere(fresh):
    assert run(Net(read_twice=True).eval(), torch.randn(4, 3, 2, 9, 8)) == (0, 0)


def test_near_miss_training_mode(fresh):
    net = Net()
    assert run(net, torch.randn(4, 3, 2, 9, 8))[0] == 0


def test_near_miss_gradients_are_recorded(fresh):
    net, x = Net().eval(), torch.randn(4, 3, 2, 9, 8)
    torch.testing.assert_close(torch.compile(net, backend=snn)(x), net(x), rtol=0, atol=0)
    assert counters["snn_compile"]["producers_fused"] == 0


def test_near_miss_split_into_other_steps(fresh):
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x):
            z = F.relu(self.norm(x)).view(6, 2, 4)
            v, out = 0.0, []
            for t in range(6):
                v = 0.5 * v + z[t]
                out.append(v)
            return torch.stack(out)

    net = Other().eval()
    assert run(net, torch.randn(12, 4))[0] == 0

"""PyTorch's recurrent cells in a time loop: one program of kernels and calls, the input's part of the gates batched over time."""

import pytest
import torch
from torch import nn

from snn_compile.backend import snn
from snn_compile.explain import explain

pytestmark = pytest.mark.usefixtures("op_by_op")


class Cells(nn.Module):
    def __init__(self, kind: str, bias: bool) -> None:
        super().__init__()
        options = {"nonlinearity": "relu"} if kind == "relu" else {}
        self.cell = {"lstm": nn.LSTMCell, "gru": nn.GRUCell}.get(kind, nn.RNNCell)(5, 8, bias=bias, **options)
        self.pair = kind == "lstm"

    def forward(self, x):
        state, out = x.new_zeros(x.shape[1], 8), []
        state = (state, state) if self.pair else state
        for t in range(x.shape[0]):
            state = self.cell(x[t], state)
            out.append(state[0] if self.pair else state)
        return torch.stack(out)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["lstm", "gru", "tanh", "relu"])
def test_cell(kind, bias, fresh):
    net = Cells(kind, bias)
    x = torch.randn(7, 3, 5, requires_grad=True)
    leaves = [x, *net.parameters()]
    expected = net(x)
    got = torch.compile(net, backend=snn, options={"step_from": 4})(x)
    torch.testing.assert_close(got, expected, rtol=0, atol=5e-7)  # (`tanh` is within 1 ulp of ATen's)
    weights = torch.linspace(-1, 1, expected.numel()).view(expected.shape)
    for a, b in zip(torch.autograd.grad(expected, leaves, weights), torch.autograd.grad(got, leaves, weights), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
    found = explain(net, step_from=4)(x)
    assert len(found.stepped) == 1 and not found.rejections and "time steps   7" in str(found), str(found)

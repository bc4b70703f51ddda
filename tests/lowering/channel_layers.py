"""Layers with batch norm of the potential, written out, and one training step of them."""

import torch
from torch import nn

from tests.passes.capture import Spike


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Over values of any number of dims."""

    def _check_input_dim(self, input):
        pass


class Layer(nn.Module):
    """A neuron written out in `step`; the normalisation is a module, so that its running statistics are seen."""

    def __init__(self, channels, affine=True, norms=1, dim=0):
        super().__init__()
        self.norm = BatchNorm(channels, affine=affine, momentum=0.3)
        self.norms = nn.ModuleList(BatchNorm(channels) for _ in range(norms))
        self.dim = dim
        if affine:
            nn.init.normal_(self.norm.weight)
            nn.init.normal_(self.norm.bias)

    def step(self, v, x):
        h = self.norm(v + (x - v) / 2.0)
        s = Spike.apply(h - 0.5)
        return s, h * (1.0 - s)

    def forward(self, x, v):
        out = []
        for t in range(x.shape[0]):
            s, v = self.step(v, x[t])
            out.append(s)
        return torch.stack(out, self.dim), v


class Raw(Layer):
    """The raw potential goes on, and the normalised one is a result."""

    def step(self, v, x):
        v = 0.9 * v + x
        h = self.norm(v)
        s = Spike.apply(h - 0.5)
        return h + s, v - s.detach()


class Two(Layer):
    """Two batch norms in a step, one behind the other."""

    def __init__(self, channels, **kwargs):
        super().__init__(channels, norms=2, **kwargs)

    def step(self, v, x):
        h = self.norms[0](v * 0.5 + x)
        s = Spike.apply(self.norms[1](h * h) - 0.2)
        return s, h - s


class Scaled(Layer):
    """A decay a channel, learnable, in the step."""

    def __init__(self, channels, **kwargs):
        super().__init__(channels, **kwargs)
        self.decay = nn.Parameter(torch.rand(channels, 1, 1))

    def step(self, v, x):
        h = self.norm(torch.sigmoid(self.decay) * v + x)
        s = Spike.apply(h - 0.5)
        return s, h - s


class Backwards(Layer):
    """The last input comes first."""

    def forward(self, x, v):
        out = []
        for t in reversed(range(x.shape[0])):
            s, v = self.step(v, x[t])
            out.append(s)
        return torch.stack(out[::-1], self.dim), v


LAYERS = {
    "hard reset": Layer,
    "no weights": lambda c: Layer(c, affine=False),
    "raw potential carried": Raw,
    "two norms": Two,
    "back in time": Backwards,
    "time last": lambda c: Layer(c, dim=-1),
}


def run(layer, x, v, weights):
    x, v = x.clone().requires_grad_(), v.clone().requires_grad_()
    y, last = layer(x, v)
    (y * weights[: y.numel()].view(y.shape)).sum().backward(retain_graph=True)
    last.square().sum().backward()
    return [y, last], [x.grad, v.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]

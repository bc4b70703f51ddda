"""States that a library keeps in its modules: carried from call to call, and reset by its own functions, compiled as in eager."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from snn_compile.backend import snn
from snn_compile.compat import prepare
from tests.ecosystem.models import has

pytestmark = pytest.mark.usefixtures("op_by_op")


class OverTime(nn.Module):
    """Calls a module step by step; its states stay in it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x):
        return torch.stack([self.module(x[t]) for t in range(x.shape[0])])


def check(module, reset, detach, scale=2.0):
    """Two calls in a row, a reset, a third: outputs bit for bit, and the gradients of the second and the third."""
    reference, x = copy.deepcopy(module), torch.rand(3, 6, 4, 20) * scale
    torch._dynamo.reset()
    runs = {"eager": (reference, reference), "snn": (module, torch.compile(module, backend=snn))}
    found = {}
    for name, (owner, run) in runs.items():
        outs, grads = [], []
        for call in range(3):
            if call == 2:
                reset(owner)
            elif call:
                detach(owner)
            a = x[call].clone().requires_grad_()
            out = run(a)
            outs.append(out.detach())
            grads.append(torch.autograd.grad(out.sum() + (out * torch.linspace(0, 1, out.numel()).view(out.shape)).sum(), a)[0])
        found[name] = outs, grads
    (outs, grads), (got, got_grads) = found["eager"], found["snn"]
    assert not torch.equal(outs[0], outs[1]) and float(outs[0].std()) > 0
    for a, b in zip(outs, got, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(grads, got_grads, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5 * float(a.abs().max()))


@pytest.mark.skipif(not has("spikingjelly"), reason="SpikingJelly is not installed")
@pytest.mark.parametrize(("name", "mode"), [("IFNode", "s"), ("LIFNode", "m"), ("ParametricLIFNode", "m")])
def test_spikingjelly(name, mode):
    from spikingjelly.activation_based import functional, neuron

    node = getattr(neuron, name)(step_mode=mode)
    check(node if mode == "m" else OverTime(node), functional.reset_net, functional.detach_net)


@pytest.mark.skipif(not has("snntorch"), reason="snnTorch is not installed")
@pytest.mark.parametrize("name", ["Leaky", "Synaptic", "Alpha"])
def test_snntorch(name):
    import snntorch

    options = () if name == "Leaky" else (0.9,)
    cell = getattr(snntorch, name)(*options, beta=0.8, init_hidden=True)
    states = {"Leaky": ["mem"], "Synaptic": ["syn", "mem"], "Alpha": ["syn_exc", "syn_inh", "mem"]}[name]

    def detach(net):
        for state in states:
            setattr(net.module, state, getattr(net.module, state).detach())

    check(OverTime(cell), lambda net: net.module.reset_mem(), detach)


@pytest.mark.skipif(not has("sinabs"), reason="sinabs is not installed")
@pytest.mark.parametrize("name", ["LIF", "ALIF", "ExpLeak"])
def test_sinabs(name):
    import sinabs
    import sinabs.layers

    options = {"LIF": {"tau_mem": 20.0, "norm_input": False}, "ExpLeak": {"tau_mem": 20.0}}
    options["ALIF"] = {"tau_mem": 20.0, "tau_adapt": 20.0}  # (its copy forgets `norm_input`)
    layer = prepare(getattr(sinabs.layers, name)(**options[name], shape=(6, 20)))
    layer.reset_states()  # (without a shape, the first call makes them, at random for ALIF)
    check(layer, sinabs.reset_states, sinabs.zero_grad, scale=20.0 if name == "ALIF" else 2.0)


@pytest.mark.skipif(not has("norse"), reason="Norse is not installed")
@pytest.mark.parametrize("name", ["LIF", "LSNN"])
def test_norse(name):
    import norse.torch as nt
    from torch.utils._pytree import tree_map

    class Carried(nn.Module):
        """Norse hands states to its caller."""

        def __init__(self, module):
            super().__init__()
            self.module, self.state = module, None

        def forward(self, x):
            out, self.state = self.module(x, self.state)
            return out

    def detach(net):
        net.state = tree_map(torch.detach, net.state)

    def reset(net):
        net.state = None

    check(prepare(Carried(getattr(nt, name)())), reset, detach)

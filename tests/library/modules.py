"""Every stateful module and every multi-step neuron of the library, with an input that it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from snn_compile import layer, neuron

T, N, C = 4, 3, 6


@dataclass(frozen=True)
class Module:
    """A module under test: `make(step_mode)` builds it, `shape` is the shape of one step's input."""

    name: str
    make: Callable[[str], nn.Module]
    shape: tuple[int, ...] = (N, C)

    def __str__(self) -> str:
        return self.name

    def inputs(self, steps: int = T, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(steps, *self.shape, generator=generator, dtype=dtype) + 0.5


def _node(cls: type, label: str = "", **kwargs) -> Module:
    return Module(f"{cls.__name__}{label}", lambda mode: cls(step_mode=mode, **kwargs))


def _neurons() -> list[Module]:
    """The neurons with the usual arguments, with hard and with soft reset."""
    nodes = [
        neuron.IFNode,
        neuron.SimpleIFNode,
        neuron.LIFNode,
        neuron.ParametricLIFNode,
        neuron.CUBALIFNode,
        neuron.KLIFNode,
        neuron.ALIFNode,
        neuron.QIFNode,
        neuron.EIFNode,
        neuron.IzhikevichNode,
    ]
    resets = {"": {}, "-soft": {"v_reset": None}, "-detach": {"v_reset": -0.1, "detach_reset": True}}
    found = [_node(cls, label, **kwargs) for cls in nodes for label, kwargs in resets.items()]
    found += [_node(neuron.SimpleLIFNode, tau=2.0, decay_input=decay) for decay in (True, False)]
    found += [_node(neuron.LIFNode, "-decay-input-False", decay_input=False, v_reset=-0.1)]
    found += [_node(neuron.KLIFNode, "-scale-reset", scale_reset=True)]
    found += [_node(neuron.LIAFNode, act=torch.tanh, threshold_related=related) for related in (True, False)]
    found += [_node(neuron.MPBNLIFNode, "-2d", out_features=C)]
    found += [_node(neuron.MPBNLIFNode, "-learnable", out_features=C, learnable_vth=True)]
    found += [Module("MPBNLIFNode-4d", lambda mode: neuron.MPBNLIFNode(step_mode=mode, out_channels=C), (N, C, 2, 2))]
    found += [Module("MPBNLIFNode-folded", _folded)]
    return found


def _folded(mode: str) -> nn.Module:
    node = neuron.MPBNLIFNode(step_mode=mode, out_features=C)
    node.re_parameterize_v_threshold(normalize_residual=True, running_stats=True)
    return node


def _layers() -> list[Module]:
    return [
        Module("NeuNorm", lambda mode: layer.NeuNorm(C, 2, 2, step_mode=mode), (N, C, 2, 2)),
        _node(layer.SynapseFilter),
        _node(layer.SynapseFilter, "-learnable", learnable=True, tau=2.0),
        _node(layer.Dropout),
        Module("Dropout2d", lambda mode: layer.Dropout2d(step_mode=mode), (N, C, 2, 2)),
        Module("DropConnectLinear", lambda mode: layer.DropConnectLinear(C, 5, invariant=True, step_mode=mode)),
        Module(
            "ElementWiseRecurrentContainer",
            lambda mode: layer.ElementWiseRecurrentContainer(neuron.LIFNode(), torch.add, mode),
        ),
        Module(
            "LinearRecurrentContainer",
            lambda mode: layer.LinearRecurrentContainer(nn.Sequential(nn.Linear(C, 5), neuron.LIFNode()), C, 5, step_mode=mode),
        ),
    ]


#: run in both step modes, with states
STATEFUL = _neurons() + _layers()

#: take sequences only; SlidingPSN and MaskedPSN have a single-step mode, which carries a queue
MULTI_STEP = [
    Module("GatedLIFNode", lambda mode: neuron.GatedLIFNode(T)),
    Module("GatedLIFNode-channels", lambda mode: neuron.GatedLIFNode(T, C), (N, C, 2, 2)),
    Module("NonSpikingIFNode", lambda mode: neuron.NonSpikingIFNode()),
    *(
        Module(f"NonSpikingLIFNode-{decode}", lambda mode, decode=decode: neuron.NonSpikingLIFNode(decode=decode))
        for decode in (None, "max-mem", "max-abs-mem", "mean-mem", "last-mem")
    ),
    Module("ILCIFNode", lambda mode: neuron.ILCIFNode(2, C // 2)),
    Module("ILCLIFNode", lambda mode: neuron.ILCLIFNode(2, C // 2, v_reset=None)),
    Module("ILCCUBALIFNode", lambda mode: neuron.ILCCUBALIFNode(2, C // 2)),
    Module("PSN", lambda mode: neuron.PSN(T)),
    Module("MaskedPSN", lambda mode: neuron.MaskedPSN(2, T, 1.0, step_mode="m")),
    Module("SlidingPSN", lambda mode: neuron.SlidingPSN(2, step_mode="m")),
    Module("MultiStepContainer", lambda mode: layer.MultiStepContainer(nn.Linear(C, 5), neuron.LIFNode())),
    Module("SeqToANNContainer", lambda mode: layer.SeqToANNContainer(nn.Linear(C, 5), nn.ReLU())),
    Module("MultiStepDropout", lambda mode: layer.MultiStepDropout()),
    Module("MultiStepDropout2d", lambda mode: layer.MultiStepDropout2d(), (N, C, 2, 2)),
]


def states(module: nn.Module) -> dict[str, Tensor]:
    """Every carried state of a module and of those inside it, by name."""
    found = {}
    for name, child in module.named_modules():
        if isinstance(child, neuron.StatefulModule):
            found |= {f"{name}.{key}": value for key, value in child.__dict__.items() if isinstance(value, Tensor)}
    return found

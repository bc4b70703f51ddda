"""Other libraries' neurons and tutorial networks, unmodified, each with what becomes of it under `backend="snn"`.

`Model.recurrences`: how many recurrences must be compiled (at least). `Model.reason`: where that is none, why.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from snn_compile.compat import prepare

T, B, N = 6, 4, 20


@dataclass(frozen=True)
class Model:
    library: str
    name: str
    make: Callable[[], nn.Module]
    recurrences: int = 1
    reason: str = ""
    #: how far apart the values may be: `tanh` is the vendor's library in ATen, and 1 ulp away from it here; what eager's sigmoid
    #: does in scalars, behind its last whole vector, is up to 2 ulp away from what it does in vectors
    atol: float = 0.0
    #: with `snn_compile.compat.prepare`
    prepared: bool = False

    def __str__(self) -> str:
        return f"{self.library}-{self.name}"

    def build(self) -> nn.Module:
        return prepare(self.make()) if self.prepared else self.make()

    def inputs(self) -> Tensor:
        return (torch.rand(T, B, N, generator=torch.Generator().manual_seed(1)) * 2).requires_grad_()


class Loop(nn.Module):
    """``for t in range(T): y, *state = cell(x[t], *state)``, the tutorial form of every library."""

    def __init__(self, cell: nn.Module, start: Callable[[nn.Module, Tensor], tuple] = lambda cell, x: ()) -> None:
        super().__init__()
        self.cell, self.start = cell, start

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        state, spikes, traces = self.start(self.cell, x[0]), [], []
        for t in range(x.shape[0]):
            result = self.cell(x[t], *state)
            spike, *new = result if isinstance(result, tuple) else (result,)
            state = new if state else ()  # a cell that keeps its state itself takes none
            spikes.append(spike)
            traces.append(new[-1] if new and isinstance(new[-1], Tensor) else spike)
        return torch.stack(spikes), torch.stack(traces)


def has(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def models() -> Iterator[Model]:
    """The models of the libraries that are installed."""
    for library, found in (
        ("snntorch", snntorch),
        ("spikingjelly", spikingjelly),
        ("norse", norse),
        ("sinabs", sinabs),
        ("tracetorch", tracetorch),
    ):
        if has(library):
            try:
                of_library = [_in_this_torch(Model(library, *m)) for m in found()]
                yield from of_library
                yield from (
                    replace(m, name=f"{m.name}, prepared", recurrences=1, reason="", prepared=True)
                    for m in of_library
                    if m.reason.startswith("Dynamo:")
                )
            except ImportError as error:  # the library is there, something that it imports is not
                warnings.warn(f"{library} is left out: {error}", stacklevel=2)


def _in_this_torch(model: Model) -> Model:
    """snnTorch's neurons compare the state that they are given with None, and Dynamo of torch 2.11 stops there."""
    if model.library == "snntorch" and "hidden state" not in model.name and torch.__version__ < (2, 13):  # type: ignore[operator]
        return replace(model, recurrences=0, reason=model.reason or "Dynamo: a tensor is compared with None")
    return model


# -------------------------------------------------------------------------------------------------------------- snnTorch


def snntorch() -> Iterator[tuple]:  # type: ignore[type-arg]
    import snntorch as snt
    from snntorch import surrogate

    def one(name: str) -> Callable[[nn.Module, Tensor], tuple]:  # type: ignore[type-arg]
        def start(cell: nn.Module, x: Tensor) -> tuple:  # type: ignore[type-arg]
            state = getattr(cell, name)()
            return state if isinstance(state, tuple) else (state,)

        return start

    def hidden(cell: nn.Module, x: Tensor) -> tuple:  # type: ignore[type-arg]
        cell.reset_mem()
        return ()

    def leaky(**options: object) -> Callable[[], nn.Module]:
        return lambda: Loop(snt.Leaky(beta=0.9, **options), one("init_leaky"))

    branch = "Dynamo: `if` on a tensor, inside of the neuron"
    for reset in ("subtract", "zero", "none"):
        yield f"Leaky, {reset}", leaky(reset_mechanism=reset)
        yield f"Leaky, {reset}, no delay", leaky(reset_mechanism=reset, reset_delay=False), 0, branch
    yield "Leaky, fast sigmoid", leaky(spike_grad=surrogate.fast_sigmoid(slope=25))
    yield "Leaky, sigmoid", leaky(spike_grad=surrogate.sigmoid(slope=5))
    yield (
        "Leaky, learnt",
        lambda: Loop(snt.Leaky(beta=torch.full((N,), 0.8), learn_beta=True, learn_threshold=True), one("init_leaky")),
    )
    yield "Leaky, hidden state", lambda: Loop(snt.Leaky(beta=0.9, init_hidden=True, output=True), hidden)
    others: dict[str, Callable[..., nn.Module]] = {
        "Lapicque": lambda **o: Loop(snt.Lapicque(beta=0.8, **o), one("init_lapicque")),
        "Synaptic": lambda **o: Loop(snt.Synaptic(alpha=0.9, beta=0.8, **o), one("init_synaptic")),
        "Alpha": lambda **o: Loop(snt.Alpha(alpha=0.9, beta=0.8, **o), one("init_alpha")),
        "RLeaky, one to one": lambda **o: Loop(snt.RLeaky(beta=0.9, all_to_all=False, **o), one("init_rleaky")),
        "RLeaky": lambda **o: Loop(snt.RLeaky(beta=0.9, linear_features=N, **o), one("init_rleaky")),
        "RSynaptic": lambda **o: Loop(snt.RSynaptic(alpha=0.9, beta=0.8, linear_features=N, **o), one("init_rsynaptic")),
    }
    for name, make in others.items():
        for reset in ("subtract", "zero", "none"):
            yield f"{name}, {reset}", lambda make=make, reset=reset: make(reset_mechanism=reset)
    for reset in ("none", "subtract", "zero"):
        options = {"reset_mechanism": reset, "threshold": 0.1}
        cells = {
            "SLSTM": lambda o=options: Loop(snt.SLSTM(N, N, **o), one("reset_mem")),
            "SConv2dLSTM": lambda o=options: Images(snt.SConv2dLSTM(1, 1, 3, **o)),
        }
        for name, make in cells.items():
            yield f"{name}, {reset}", make, 1, "", 2e-7
    yield "LeakyParallel", lambda: snt.LeakyParallel(N, N), 0, "Dynamo does not enter `nn.RNN`"
    yield "tutorial net", lambda: TutorialNet(snt), 2
    yield "tutorial net, static input", lambda: TutorialNet(snt, static=True), 2


class Images(Loop):
    """A convolutional cell over images of one channel."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__(cell, lambda cell, x: cell.reset_mem())

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return super().forward(x.view(T, B, 1, 4, N // 4))


class TutorialNet(nn.Module):
    """Tutorial 5 of snnTorch."""

    def __init__(self, snt, hidden: int = 32, outputs: int = 10, static: bool = False) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.fc1, self.lif1 = nn.Linear(N, hidden), snt.Leaky(beta=0.95)
        self.fc2, self.lif2 = nn.Linear(hidden, outputs), snt.Leaky(beta=0.95)
        self.static = static

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mem1, mem2 = self.lif1.init_leaky(), self.lif2.init_leaky()
        spk2_rec, mem2_rec = [], []
        for step in range(x.shape[0]):
            cur1 = self.fc1(x[0] if self.static else x[step])
            spk1, mem1 = self.lif1(cur1, mem1)
            cur2 = self.fc2(spk1)
            spk2, mem2 = self.lif2(cur2, mem2)
            spk2_rec.append(spk2)
            mem2_rec.append(mem2)
        return torch.stack(spk2_rec, dim=0), torch.stack(mem2_rec, dim=0)


# ---------------------------------------------------------------------------------------------------------- SpikingJelly


def spikingjelly() -> Iterator[tuple]:  # type: ignore[type-arg]
    from spikingjelly.activation_based import functional, layer, neuron, rnn, surrogate

    nodes: dict[str, Callable[[], nn.Module]] = {
        f"{name}{label}": lambda name=name, options=options: getattr(neuron, name)(**options)
        for name in ("IFNode", "LIFNode", "ParametricLIFNode", "QIFNode", "EIFNode", "IzhikevichNode", "KLIFNode")
        for label, options in (("", {}), (", soft", {"v_reset": None}), (", detached", {"detach_reset": True}))
        if not (label and name in ("QIFNode", "EIFNode", "IzhikevichNode"))
    }
    nodes |= {
        "LIFNode, no decay of the input": lambda: neuron.LIFNode(decay_input=False),
        "LIFNode, all states": lambda: neuron.LIFNode(store_v_seq=True),
        "LIAFNode": lambda: neuron.LIAFNode(torch.relu, False),
        "CUBALIFNode": lambda: neuron.CUBALIFNode(),
        "SLTTLIFNode": lambda: neuron.SLTTLIFNode(),
    }
    for kind in ("ATan", "PiecewiseQuadratic", "PiecewiseExp", "SoftSign", "SuperSpike", "Erf"):
        nodes[f"LIFNode, {kind}"] = lambda kind=kind: neuron.LIFNode(surrogate_function=getattr(surrogate, kind)())
    for name, make in nodes.items():
        yield f"{name}, single step", lambda make=make: Loop(make())
        if name != "LIFNode, all states":
            yield f"{name}, multi-step", lambda make=make: _multi_step(functional, make())
    for name in ("SpikingVanillaRNN", "SpikingGRU", "SpikingLSTM"):  # the last one bounds its state under `no_grad`
        yield name, lambda name=name: First(getattr(rnn, name)(N, N, 1))
    yield "LinearRecurrentContainer", lambda: _multi_step(functional, layer.LinearRecurrentContainer(neuron.LIFNode(), N, N))
    yield "PSN", lambda: neuron.PSN(T), 0, "no state: one matrix product over time"
    yield "tutorial net", lambda: JellyNet(neuron, surrogate), 2


class First(nn.Module):
    """The series that a recurrent network gives, without its last states."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)[0]


def _multi_step(functional, module: nn.Module) -> nn.Module:  # type: ignore[no-untyped-def]
    functional.set_step_mode(module, "m")
    return module


class JellyNet(nn.Module):
    """The single-step form of SpikingJelly's first tutorial: firing rates of a two-layer net."""

    def __init__(self, neuron, surrogate) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.layer = nn.Sequential(
            nn.Linear(N, 32, bias=False),
            neuron.LIFNode(tau=2.0, surrogate_function=surrogate.ATan()),
            nn.Linear(32, 10, bias=False),
            neuron.LIFNode(tau=2.0, surrogate_function=surrogate.ATan()),
        )

    def forward(self, x: Tensor) -> Tensor:
        rate = 0.0
        for t in range(x.shape[0]):
            rate += self.layer(x[t])
        return rate / x.shape[0]


# ----------------------------------------------------------------------------------------------------------------- Norse


class NorseNet(nn.Module):
    """Norse's MNIST tutorial: spiking layers, and the voltage of a leaky integrator read out."""

    def __init__(self, nt, hidden: int = 32, outputs: int = 10) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.fc1, self.lif = nn.Linear(N, hidden), nt.LIFCell()
        self.fc2, self.readout = nn.Linear(hidden, outputs, bias=False), nt.LICell()

    def forward(self, x: Tensor) -> Tensor:
        s1 = so = None
        voltages = []
        for ts in range(x.shape[0]):
            z, s1 = self.lif(self.fc1(x[ts] * 10), s1)
            vo, so = self.readout(torch.relu(self.fc2(z)), so)
            voltages.append(vo)
        return torch.stack(voltages)


def norse() -> Iterator[tuple]:  # type: ignore[type-arg]
    import norse.torch as nt
    from torch.utils._pytree import tree_map

    class Given(nn.Module):
        """The initial state is made outside of the compiled function: Norse's own writes `requires_grad`, a graph break."""

        def __init__(self, cell: nn.Module) -> None:
            super().__init__()
            self.cell = cell
            start = cell.state_fallback if hasattr(cell, "state_fallback") else cell.initial_state
            self.state = tree_map(lambda s: s.detach() if isinstance(s, Tensor) else s, start(torch.zeros(B, N)))

        def forward(self, x: Tensor) -> Tensor:
            state, out = self.state, []
            for t in range(x.shape[0]):
                y, state = self.cell(x[t], state)
                out.append(y)
            return torch.stack(out)

    class First(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: Tensor) -> Tensor:
            return self.module(x)[0]

    for name in ("LIFCell", "LIFBoxCell", "IAFCell", "LICell", "LIBoxCell", "LIFAdExCell", "LIFExCell", "LSNNCell"):
        yield f"{name}, state given", lambda name=name: Given(getattr(nt, name)())
    breaks = "Dynamo: `state.v.requires_grad = True`; pass the state"
    yield "LIFCell", lambda: Loop(nt.LIFCell(), lambda cell, x: (None,)), 0, breaks
    for name in ("LIF", "LI", "LSNN", "LIFAdEx", "LIFEx"):
        yield name, lambda name=name: First(getattr(nt, name)())
    yield "tutorial net", lambda: NorseNet(nt), 0, breaks


# ---------------------------------------------------------------------------------------------------------------- sinabs


class SinabsNet(nn.Module):
    """sinabs' first tutorial: an artificial network whose activations have become spiking layers over ``[B*T, N]``."""

    def __init__(self, sl, hidden: int = 32, outputs: int = 10) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(N, hidden, bias=False),
            sl.IAFSqueeze(batch_size=B, min_v_mem=-1.0),
            nn.Linear(hidden, outputs, bias=False),
            sl.IAFSqueeze(batch_size=B, min_v_mem=-1.0),
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, steps = x.shape[1], x.shape[0]
        return self.layers(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (batch, steps))  # type: ignore[no-any-return]


def sinabs() -> Iterator[tuple]:  # type: ignore[type-arg]
    import sinabs.activation as sa
    import sinabs.layers as sl

    class BatchFirst(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.transpose(0, 1).contiguous())

    made: dict[str, Callable[..., nn.Module]] = {
        "IAF": lambda **o: sl.IAF(**o),
        "LIF": lambda **o: sl.LIF(tau_mem=20.0, **o),
        "LIF, synapse": lambda **o: sl.LIF(tau_mem=20.0, tau_syn=10.0, **o),
        "LIF, reset to zero": lambda **o: sl.LIF(tau_mem=20.0, reset_fn=sa.MembraneReset(), **o),
        "ALIF": lambda **o: sl.ALIF(tau_mem=20.0, tau_adapt=20.0, **o),
    }
    for name, make in made.items():
        yield f"{name}, MaxSpike", lambda make=make: BatchFirst(make(spike_fn=sa.MaxSpike()))
    attribute = "Dynamo: a class attribute of an autograd.Function; use MaxSpike()"
    for name, make in made.items():
        for spike in (sa.MultiSpike, sa.SingleSpike):
            if name != "LIF, synapse":
                yield f"{name}, {spike.__name__}", lambda make=make, spike=spike: BatchFirst(make(spike_fn=spike)), 0, attribute
    yield "ExpLeak", lambda: BatchFirst(sl.ExpLeak(tau_mem=20.0))
    yield "tutorial net", lambda: SinabsNet(sl), 0, attribute


# ------------------------------------------------------------------------------------------------------------- traceTorch


def tracetorch() -> Iterator[tuple]:  # type: ignore[type-arg]
    import tracetorch as tt

    class Channels(nn.Module):
        """Along the dim of channels, which the layer turns to be the last one, and back."""

        def __init__(self, make: Callable[..., nn.Module]) -> None:
            super().__init__()
            self.loop = Loop(make(num_neurons=2, dim=-2))

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return self.loop(x.unflatten(-1, (2, -1)))  # type: ignore[no-any-return]

    smooth = 1, "", 3e-7  # (its spikes are sigmoids, unless they are rounded)
    for name in ("LI", "DSLI", "LIB", "RLIB", "DSRLIB", "LITS", "DSRLITS"):
        make = getattr(tt.snn, name)
        yield name, lambda make=make: Loop(make(num_neurons=N)), *smooth
    for name in ("LIB", "RLIT"):
        make = getattr(tt.snn, name)
        yield f"{name}, of channels", lambda make=make: Channels(make), *smooth
    yield "LIB, rounded", lambda: Loop(tt.snn.LIB(num_neurons=N, quant_fn=tt.functional.round_ste()))

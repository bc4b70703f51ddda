"""Open Neuromorphic's benchmark of frameworks - one dense layer of N to N and LIF neurons, B=16, T=500 - in one run.

    python benchmarks/open_neuromorphic.py [N ...]

Every framework runs its own LIF neuron the way its documentation does, so equations and surrogates differ; what they share is
the work: a product of matrices, 500 steps of a leaky integrator with threshold and reset, and the gradient of the weights.
`snn_compile` runs beside the same module in eager and must give its spikes. Inductor is left out: it unrolls 500 steps.
https://open-neuromorphic.org/blog/spiking-neural-network-framework-benchmarking/
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
from collections.abc import Callable

import _harness as h
import torch
from neurons import Steps
from torch import Tensor, nn

from snn_compile import neuron
from snn_compile.backend import snn

BATCH, STEPS, ROUNDS = 16, 500, 3

#: ``run(x) -> spikes``, both ``[T, B, N]``, and a module whose parameters get gradients
Model = tuple[Callable[[Tensor], Tensor], nn.Module]


def own(n: int, backend: object = None) -> Model:
    model = nn.Sequential(nn.Linear(n, n), neuron.LIFNode(step_mode="m"))
    run = model if backend is None else torch.compile(model, backend=backend)  # type: ignore[call-overload]

    def step(x: Tensor) -> Tensor:
        model[1].reset()  # type: ignore[operator]
        return run(x)  # type: ignore[no-any-return]

    return step, model


def spikingjelly(n: int) -> Model:
    from spikingjelly.activation_based import functional, neuron

    model = nn.Sequential(nn.Linear(n, n), neuron.LIFNode(step_mode="m"))

    def step(x: Tensor) -> Tensor:
        functional.reset_net(model)
        return model(x)  # type: ignore[no-any-return]

    return step, model


def snntorch(n: int) -> Model:
    import snntorch

    lif = snntorch.Leaky(beta=0.95)
    model = nn.Sequential(nn.Linear(n, n), Steps(lif, lif.init_leaky))
    return model, model


def norse(n: int) -> Model:
    import norse.torch as norse

    model = nn.Sequential(nn.Linear(n, n), Steps(norse.LIFBoxCell()))
    return model, model


def sinabs(n: int) -> Model:
    import sinabs.layers as layers

    model = nn.Sequential(nn.Linear(n, n), layers.LIF(tau_mem=20.0))

    def step(x: Tensor) -> Tensor:
        model[1].reset_states()  # type: ignore[operator]
        return model(x.transpose(0, 1)).transpose(0, 1)  # type: ignore[no-any-return]

    return step, model


def spyx(n: int, x: Tensor) -> Callable[[], None]:
    """JAX, compiled by XLA: one training step."""
    import jax
    import spyx.nn
    from flax import nnx

    rngs = nnx.Rngs(0)
    model = spyx.nn.Sequential(nnx.Linear(n, n, rngs=rngs), spyx.nn.LIF((n,), beta=0.95, rngs=rngs))
    given = jax.numpy.asarray(x.numpy())

    @nnx.jit
    def gradient(model, given):  # type: ignore[no-untyped-def]
        return nnx.grad(lambda m: spyx.nn.run(m, given)[0].sum())(model)

    return lambda: jax.block_until_ready(gradient(model, given))  # type: ignore[no-any-return]


MAKERS: dict[str, Callable[[int], Model]] = {
    "snn_compile, eager": own,
    "snn_compile": lambda n: own(n, snn),
    "spikingjelly": spikingjelly,
    "snntorch": snntorch,
    "norse": norse,
    "sinabs": sinabs,
}


def training_step(model: Model, x: Tensor) -> Callable[[], Tensor]:
    run, module = model

    def step() -> Tensor:
        module.zero_grad()
        spikes = run(x)
        spikes.sum().backward()
        return spikes.detach()

    return step


def measure(n: int) -> list[dict[str, str]]:
    x = 5.0 * torch.rand(STEPS, BATCH, n, generator=torch.Generator().manual_seed(0))  # (neurons fire)
    steps: dict[str, Callable[[], object]] = {}
    firsts, spikes = {}, {}
    for name, make in MAKERS.items():
        if not name.startswith("snn_compile") and importlib.util.find_spec(name) is None:
            continue
        torch.manual_seed(0)
        step = steps[name] = training_step(make(n), x)
        spikes[name], firsts[name] = h.first_call(step)
        assert spikes[name].shape == x.shape
    assert torch.equal(spikes["snn_compile"], spikes["snn_compile, eager"])
    if importlib.util.find_spec("spyx") is not None:
        step = steps["spyx"] = spyx(n, x)  # type: ignore[assignment]
        _, firsts["spyx"] = h.first_call(step)
    times = h.interleaved(steps, ROUNDS)
    reference = statistics.median(times["snn_compile"])
    return [
        {
            "N": str(n),
            "framework": name,
            "first_call_s": f"{firsts[name]:.1f}",
            **h.summary(values),
            "snn_is_faster_by": f"{statistics.median(values) / reference:.1f}",
            "spikes_per_step": f"{float(spikes[name].mean()):.3f}" if name in spikes else "",
            **h.machine(),
        }
        for name, values in times.items()
    ]


def main() -> None:
    rows = []
    for n in map(int, sys.argv[1:] or ("512",)):
        rows += measure(n)
        columns = ["N", "framework", "first_call_s", "median_ms", "snn_is_faster_by", "spikes_per_step"]
        print(h.markdown([r for r in rows if r["N"] == str(n)], columns), flush=True)
    if not sys.argv[1:]:
        print(h.write("open_neuromorphic_cpu", rows))


if __name__ == "__main__":
    main()

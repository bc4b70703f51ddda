"""One picture of how every neuron of the library responds to a step current.

    python examples/neuron_responses.py --output neuron_responses.svg

Each panel shows the membrane potential after the reset (line), the threshold where it is fixed (dashed), and the spikes
(ticks above). Where no sequence of potentials is kept, the panel shows the output.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from snn_compile import neuron

T, START, STOP = 60, 10, 50
INK, LINE, SPIKE = "#333333", "#1f5fa8", "#c2410c"


def inhibiting_ilc() -> nn.Module:
    """One ILC neuron that inhibits itself after each spike."""
    node = neuron.ILCCUBALIFNode(1, 1, 0.8, 0.9)
    nn.init.constant_(node.conn.weight, -0.1)
    nn.init.zeros_(node.conn.bias)
    return node


#: panel title, how to build the neuron, size of the step current
NEURONS: list[tuple[str, Callable[[], nn.Module], float]] = [
    ("IF", lambda: neuron.IFNode(step_mode="m", store_v_seq=True), 0.15),
    ("IF, soft reset", lambda: neuron.IFNode(v_reset=None, step_mode="m", store_v_seq=True), 0.15),
    ("LIF", lambda: neuron.LIFNode(8.0, step_mode="m", store_v_seq=True), 1.4),
    ("Parametric LIF, 1/tau learned", lambda: neuron.ParametricLIFNode(5.0, step_mode="m", store_v_seq=True), 1.4),
    ("CUBA-LIF", lambda: neuron.CUBALIFNode(0.8, 0.9, step_mode="m", store_v_seq=True), 0.02),
    ("KLIF, soft reset", lambda: neuron.KLIFNode(tau=8.0, v_reset=None, step_mode="m", store_v_seq=True), 1.8),
    ("ALIF, threshold adapts", lambda: neuron.ALIFNode(8.0, rho=0.95, step_mode="m", store_v_seq=True), 2.0),
    ("QIF", lambda: neuron.QIFNode(8.0, step_mode="m", store_v_seq=True), 0.4),
    ("EIF", lambda: neuron.EIFNode(8.0, delta_T=0.3, step_mode="m", store_v_seq=True), 0.9),
    (
        "Izhikevich",
        lambda: neuron.IzhikevichNode(8.0, a=0.1, b=0.15, tau_w=12.0, step_mode="m", store_v_seq=True),
        0.7,
    ),
    ("Gated LIF, initial gates", lambda: neuron.GatedLIFNode(T), 0.5),
    ("LIAF, relu(h): output", lambda: neuron.LIAFNode(torch.relu, False, 8.0, step_mode="m"), 1.4),
    ("MPBN-LIF, eval", lambda: neuron.MPBNLIFNode(8.0, out_features=1, step_mode="m", store_v_seq=True).eval(), 0.2),
    ("ILC-CUBA-LIF, inhibits itself", inhibiting_ilc, 0.06),
    ("Non-spiking LIF: output", lambda: neuron.NonSpikingLIFNode(8.0), 1.0),
    ("Sliding PSN, order 4", lambda: neuron.SlidingPSN(4, step_mode="m"), 0.7),
]


def step_current(size: float) -> Tensor:
    """`size` from START to STOP, 0 elsewhere, [T, 1, 1]."""
    current = torch.zeros(T, 1, 1)
    current[START:STOP] = size
    return current


def draw(axes: plt.Axes, title: str, node: nn.Module, size: float) -> None:
    """One panel: the response of `node` to a step current of `size`."""
    with torch.no_grad():
        output = node(step_current(size)).flatten()
    potential = getattr(node, "v_seq", None)
    is_spikes = bool(((output == 0) | (output == 1)).all())
    axes.axvspan(START, STOP, color="#f1f1ee", linewidth=0)
    if potential is not None:
        axes.plot(potential.flatten(), color=LINE, linewidth=1.4)
    elif not is_spikes:
        axes.plot(output, color=LINE, linewidth=1.4)
    threshold = getattr(node, "v_threshold", None)
    if isinstance(threshold, float) and potential is not None and not isinstance(node, neuron.ALIFNode):
        axes.axhline(threshold, color=INK, linewidth=0.7, linestyle=(0, (4, 3)))
    if is_spikes:
        times = output.nonzero().flatten()
        low, high = (0.3, 0.7) if potential is None else (1.02, 1.13)  # of the panel's height
        axes.vlines(times, low, high, color=SPIKE, linewidth=1.2, transform=axes.get_xaxis_transform(), clip_on=False)
        if potential is None:
            axes.set_yticks([])
    axes.set_title(title, loc="left", fontsize=9, color=INK, pad=16)
    axes.set_xlim(0, T)
    axes.tick_params(labelsize=7, colors=INK, length=2)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def draw_all() -> plt.Figure:
    """The picture of all neurons."""
    torch.manual_seed(0)
    columns = 4
    rows = -(-len(NEURONS) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(11, 2.0 * rows), layout="constrained")
    for axes, (title, make, size) in zip(grid.flat, NEURONS, strict=False):
        draw(axes, f"{title}   x = {size:g}", make(), size)
    for axes in grid.flat[len(NEURONS) :]:
        axes.set_axis_off()
    for axes in grid[-1]:
        axes.set_xlabel("step", fontsize=8, color=INK)
    figure.suptitle(
        "Response to a step current (grey: current on; line: potential after reset; ticks: spikes; dashed: threshold)",
        fontsize=10,
        color=INK,
    )
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="neuron_responses.svg", help="the picture's path; its ending says the format")
    output = parser.parse_args(arguments).output
    draw_all().savefig(output, dpi=90)
    print(f"wrote {output}")


if __name__ == "__main__":
    main()

"""Pictures of the committed results: ``python benchmarks/charts.py`` writes docs/pictures/*.png."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import matplotlib
from _results import picture, read, where

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PICTURES = Path(__file__).parent.parent / "docs" / "pictures"
#: one hue a framework, in every picture
COLOURS = {"eager": "#9aa5b1", "spikingjelly": "#c9a227", "inductor": "#5b8db8", "snn": "#c44536"}
NAMES = {"eager": "eager", "spikingjelly": "SpikingJelly 2.0", "inductor": "Inductor", "snn": 'backend="snn"'}


def plain(axis: plt.Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="both", color="#e4e7eb", linewidth=0.6)
    axis.set_axisbelow(True)


def save(figure: plt.Figure, name: str, rows: list[dict[str, str]]) -> None:
    about = next(r for r in rows if r["machine"])
    figure.text(0.5, -0.2 / figure.get_figheight(), where(about), ha="center", fontsize=7, color="#616e7c")
    PICTURES.mkdir(exist_ok=True)
    figure.savefig(PICTURES / f"{name}.png", dpi=130, bbox_inches="tight")
    plt.close(figure)


def speeds(device: str) -> None:
    """Training step of each network and recurrence, relative to eager."""
    rows = [{**r, "what": r["network"]} for r in read(f"networks_{device}")]
    rows += [{**r, "what": r["recurrence"]} for r in read(f"stepped_{device}")]
    rows = [r for r in rows if r["speed_vs_eager"]]
    names = list(dict.fromkeys(r["what"] for r in rows))
    frameworks = [f for f in ("snn", "inductor", "spikingjelly") if any(r["framework"] == f for r in rows)]
    figure, axis = plt.subplots(figsize=(7.5, 0.52 * len(names) + 0.8))
    for place, name in enumerate(reversed(names)):
        mine = {r["framework"]: float(r["speed_vs_eager"]) for r in rows if r["what"] == name}
        shown = [f for f in frameworks if f in mine]
        height = 0.76 / max(2, len(shown))
        for i, framework in enumerate(shown):
            at = place + 0.38 - height * (i + 0.5)
            axis.barh(at, mine[framework], 0.9 * height, color=COLOURS[framework])
            axis.text(mine[framework] + 0.1, at, f"{mine[framework]:.1f}", va="center", fontsize=8)
    axis.axvline(1.0, color=COLOURS["eager"], linewidth=1.5)
    axis.set_yticks(range(len(names)), reversed(names), fontsize=8)
    axis.set_ylim(-0.6, len(names) - 0.4)
    axis.set_xlabel("times faster than eager (grey line); no bar: Inductor would compile for very long")
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[f]) for f in frameworks]
    axis.legend(handles, [NAMES[f] for f in frameworks], frameon=False, loc="lower right")
    plain(axis)
    save(figure, picture("networks", device), rows)


def first_calls() -> None:
    """First call against T."""
    rows = [r for r in read("first_call") if r["process"].startswith("cold")]
    figure, axis = plt.subplots(figsize=(6.5, 3.6))

    def line(points: Iterable[tuple[int, float]], framework: str, label: str, style: str = "-") -> None:
        axis.plot(*zip(*points, strict=True), style, marker="o", markersize=4, color=COLOURS[framework], label=label)

    trace = {int(r["T"]): float(r["dynamo_s"]) for r in rows}
    inductor = [(int(r["T"]), float(r["inductor_beyond_dynamo_s"])) for r in rows if r["inductor_beyond_dynamo_s"]]
    line([(t, trace[t] + s) for t, s in inductor], "inductor", NAMES["inductor"])
    line([(int(r["T"]), trace[int(r["T"])] + float(r["snn_beyond_dynamo_s"])) for r in rows], "snn", NAMES["snn"])
    line(list(trace.items()), "eager", "Dynamo's trace alone", "--")
    line([(int(r["T"]), float(r["snn_scan_s"])) for r in rows], "snn", f"{NAMES['snn']}, written as a scan", ":")
    axis.set(xscale="log", yscale="log", xlabel="time steps T", ylabel="first call [s]")
    axis.set_xticks(list(trace), [str(t) for t in trace])
    axis.minorticks_off()
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    plain(axis)
    save(figure, "first_call", rows)


def cost_per_element(rows: list[dict[str, str]], framework: str, vary: str, fixed: str) -> list[tuple[int, float]]:
    """(T or N, nanoseconds) of the training rows whose other size is `fixed`."""
    points = []
    for row in rows:
        name, *sizes = row["row"].split()
        if (row["framework"], name, len(sizes)) == (framework, "LIFNode", 2) and fixed in sizes and row["median_ms"]:
            of = {k: int(v) for k, v in (part.split("=") for part in sizes)}
            points.append((of[vary], float(row["median_ms"]) * 1e6 / (of["T"] * of["N"])))
    return sorted(points)


def over_steps_and_lanes(device: str, lanes: str) -> None:
    """A LIF layer's training step, per element, against T and against N."""
    rows = read(f"neurons_{device}")
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for axis, vary, fixed in ((axes[0], "T", f"N={lanes}"), (axes[1], "N", "T=64")):
        for framework in COLOURS:
            if points := cost_per_element(rows, framework, vary, fixed):
                style = {"marker": "o", "markersize": 4, "color": COLOURS[framework], "label": NAMES[framework]}
                axis.plot(*zip(*points, strict=True), **style)
        axis.set(xscale="log", yscale="log", xlabel=f"{vary} ({fixed})")
        shown = sorted({x for line in axis.lines for x in line.get_xdata()})
        axis.set_xticks(shown, [str(int(x)) for x in shown])
        axis.minorticks_off()
        plain(axis)
    axes[0].set_ylabel("training, ns per step and lane")
    if device == "cpu":
        axes[0].set_yticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
    axes[0].legend(frameon=False, fontsize=8)
    save(figure, picture("lif", device), rows)


def memory(device: str) -> None:
    """Peak memory of one call, against T."""
    rows = read(f"memory_{device}")
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    for axis, work in zip(axes, dict.fromkeys(r["work"] for r in rows), strict=False):
        for framework in dict.fromkeys(r["framework"] for r in rows if r["work"] == work):
            points = [(int(r["T"]), float(r["peak_MiB"])) for r in rows if (r["work"], r["framework"]) == (work, framework)]
            base, *rest = framework.split(", ")
            label = ", ".join([NAMES[base], *rest])
            axis.plot(*zip(*points, strict=True), ":" if rest else "-", marker="o", ms=4, color=COLOURS[base], label=label)
        axis.set(xscale="log", yscale="log", xlabel="time steps T", title=work)
        axis.title.set_size(9)
        steps = sorted({int(r["T"]) for r in rows})
        axis.set_xticks(steps, [str(t) for t in steps])
        axis.minorticks_off()
        axis.legend(frameon=False, fontsize=8)
        plain(axis)
    axes[0].set_ylabel("peak memory of a call [MiB]")
    save(figure, picture("memory", device), rows)


def losses() -> None:
    """Training curves, eager and compiled, of three seeds."""
    rows = read("loss_curves")
    figure, axis = plt.subplots(figsize=(6.5, 3.4))
    for seed in dict.fromkeys(r["seed"] for r in rows):
        for framework, style, width in (("eager", "-", 3.0), ("snn", "-", 0.9)):
            curve = [float(r["loss"]) for r in rows if (r["seed"], r["framework"]) == (seed, framework)]
            label = NAMES[framework] if seed == "0" else None
            axis.plot(curve, style, linewidth=width, color=COLOURS[framework], label=label)
    axis.set(xlabel="update", ylabel="cross entropy")
    axis.legend(frameon=False)
    plain(axis)
    save(figure, "loss_curves", rows)


def main() -> None:
    for device, lanes in (("cpu", "65536"), ("gpu", "1048576")):
        if read(f"networks_{device}") or read(f"stepped_{device}"):
            speeds(device)
        if read(f"neurons_{device}"):
            over_steps_and_lanes(device, lanes)
        if read(f"memory_{device}"):
            memory(device)
    first_calls()
    losses()


if __name__ == "__main__":
    main()

"""Write the committed results into README.md (in short) and docs/benchmarks.md (whole): ``python benchmarks/render.py``."""

from __future__ import annotations

import statistics
from pathlib import Path

from _gate import NOTHING
from _results import markdown, picture, read, where

ROOT = Path(__file__).parent.parent
README, DOCUMENT = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
START, STOP = "<!-- measured -->", "<!-- /measured -->"


def table(name: str, columns: list[str]) -> str:
    """The rows of a file; a row of ours that Inductor ran says so."""
    rows = read(name)
    for row in (r for r in rows if r.get("compiled") == NOTHING):
        row["framework"] += f" ({NOTHING})"
    return markdown(rows, columns)


def layer_table() -> str:
    training = read("lif_training_cpu")
    steps = [{**r, "snn is faster by": r["snn_is_faster_by"], "of the floor": r["times_floor"]} for r in training if r["machine"]]
    memory = next(r["median_ms"] for r in training if r["what"].startswith("peak"))
    return f"""One LIF layer, T=64, fp32, forward and backward; medians of one interleaved run, in ms ({where(training[0])};
`benchmarks/lif_training.py`). The floor is five tensors of [T, N] read or written, taken as 2.5 copies of one. Peak memory of
that step is {memory} times x, spikes and their gradients.

{markdown(steps, ["N", "what", "median_ms", "snn is faster by", "of the floor"])}
"""


def readme() -> str:
    return f"""{layer_table()}
Training steps of whole networks and of recurrences that are more than pointwise, and the first call against T (the trace is
Dynamo's own); every number, with first calls and agreement, is in [docs/benchmarks.md](docs/benchmarks.md):

![training steps, relative to eager](docs/pictures/networks.png)
![first call against T](docs/pictures/first_call.png)
{readme_gpu()}"""


def readme_gpu() -> str:
    """Nothing where no GPU was measured."""
    networks = read("networks_gpu")
    if not networks:
        return ""
    return f"""
The same on a GPU ({where(networks[0])}); [all of it](docs/benchmarks.md#on-a-gpu):

![training steps on a GPU, relative to eager](docs/pictures/networks_gpu.png)
"""


def curves() -> str:
    """How far apart the curves are."""
    loss = {(r["seed"], r["framework"], r["update"]): float(r["loss"]) for r in read("loss_curves")}
    same = [abs(v - loss[s, "snn", u]) for (s, f, u), v in loss.items() if f == "eager"]
    seeds = [abs(v - loss["1", f, u]) for (s, f, u), v in loss.items() if f == "eager" and s == "0"]
    return f"""Between the two, the loss differs by {statistics.mean(same):.4f} in the mean; between two seeds in eager by
{statistics.mean(seeds):.4f}."""


def neurons(device: str) -> str:
    columns = ["row", "framework", "first_call_s", "median_ms", "speed_vs_eager", "equal_spikes", "of_copy"]
    peer = next((r["implementation"] for r in read(f"neurons_{device}") if r.get("implementation")), "")
    uses = f" SpikingJelly's own implementation of a LIF neuron here: {peer}." if peer else ""
    copied = {"cpu": "x; below a few megabytes it stays in the cache,\nwhich arithmetic cannot keep up with", "gpu": "a GiB"}[
        device
    ]
    return f"""![a LIF layer against T and N](pictures/{picture("lif", device)}.png)

`equal_spikes`: the share of spikes equal to eager's. `of_copy`: the bytes that the equations need to move (training: x, spikes,
cotangent, gradient, x again; inference: x, spikes) over the time, relative to a copy in the same run of {copied}.{uses}

{table(f"neurons_{device}", columns)}
"""


def networks(device: str) -> str:
    columns = ["network", "framework", "first_call_s", "step_ms", "speed_vs_eager", "equal_outputs"]
    return f"""![training steps, relative to eager](pictures/{picture("networks", device)}.png)

`equal_outputs` under 1: layers that run over all steps at once sum in another order, which moves a spike now and then; a deep
network amplifies that, so its results are compared in fp64, where they are eager's, before it is timed.

{table(f"networks_{device}", columns)}
"""


def stepped(device: str) -> str:
    columns = ["recurrence", "framework", "first_call_s", "step_ms", "speed_vs_eager", "spikes_per_step"]
    return f"""Inductor is left out where its compilation takes very long.

{table(f"stepped_{device}", columns)}
"""


def folding(device: str) -> str:
    return f"""In evaluation, batch norm of the potential is a scale and a shift in the kernel (`passes/fold_batch_norm`): the
neuron with it in turns with the same neuron without (`benchmarks/folding.py`).

{table(f"folding_{device}", ["neuron", "shape", "framework", "first_call_s", "step_ms", "speed_vs_eager", "cost_vs_lif"])}
"""


def open_neuromorphic(device: str) -> str:
    columns = ["N", "framework", "first_call_s", "median_ms", "snn_is_faster_by"]
    return f"""Linear(N, N) and LIF neurons, B=16, T=500, a training step, every framework with its own neuron and its own
surrogate (`benchmarks/open_neuromorphic.py`); Spyx is compiled by XLA. The three products of matrices are the same work in all of
them.

{table(f"open_neuromorphic_{device}", columns)}
"""


def memory(device: str) -> str:
    return f"""Of one call, beyond what is held before it (`benchmarks/memory.py`). In inference, layers that run over all steps
at once hold the values of all steps; `time_chunk="auto"`, the default, cuts the loop where that is more than twice eager's peak
and a GiB.

![peak memory against T](pictures/{picture("memory", device)}.png)

{table(f"memory_{device}", ["work", "framework", "T", "peak_MiB"])}
"""


#: file of results, title, section
SECTIONS = (
    ("neurons", "Single neurons, against T and N", neurons),
    ("networks", "Whole networks", networks),
    ("stepped", "Recurrences that are more than pointwise", stepped),
    ("folding", "Batch norm of the potential in evaluation", folding),
    ("open_neuromorphic", "Open Neuromorphic's layer", open_neuromorphic),
    ("memory", "Peak memory", memory),
)


def sections(device: str, level: str) -> str:
    """Of every file that this device has."""
    made = [f"{level} {title}\n\n{section(device)}" for name, title, section in SECTIONS if read(f"{name}_{device}")]
    return "\n".join(made)


def gpu() -> str:
    """One chapter for the GPU's files; nothing without them."""
    measured = next((rows for name, *_ in SECTIONS if (rows := read(f"{name}_gpu"))), [])
    if not measured:
        return ""
    return f"""
## On a GPU

`make bench-gpu` on {where(measured[0])}; {measured[0]["versions"]}. Times lie between two CUDA events, with cold caches;
convolutions do not round to TF32 unless a row says bf16 or fp16. An empty cell: the peer is not installed there, or failed.

{sections("gpu", "###")}"""


NO_GPU_YET = """ No GPU has been at hand so far: the
Triton kernels are compiled and read (`benchmarks/results/triton_assembly.csv`), not timed."""


def document() -> str:
    first, products, on_gpu = read("first_call"), read("spike_products_cpu"), gpu()
    return f"""# Benchmarks

Generated by `python benchmarks/render.py` from `benchmarks/results/*.csv`; `make bench` measures, `make bench-check` reruns a
few rows and fails where one is more than a quarter slower, against its peers, than what is committed. All contestants of a row
take turns in one process, after a check that they agree. Machine: {where(read("neurons_cpu")[0])}.{"" if on_gpu else NO_GPU_YET}

What was slow and why, and floors: [results/NOTES.md](../benchmarks/results/NOTES.md).

## One layer

{layer_table()}
{sections("cpu", "##")}
## A product of spikes and a weight

Beside the sum of the rows of the weight whose spike is 1, which has the same bits. A recurrence takes the sum for up to a quarter
of ones.

{markdown(products, ["rows, depth, columns", "share of ones", "product_us", "rows_us", "rows_are_faster_by"])}

## Training curves

The network of snnTorch's tutorial, T=100, 200 updates on rate-coded digits, three seeds, each eager (wide) and compiled (narrow);
`benchmarks/loss_curves.py`. {curves()}

![losses](pictures/loss_curves.png)

## First call

Forward and backward of one LIF layer, in seconds beyond Dynamo's own trace.
`snn_scan_s`: the whole first call, trace included, of the same neuron written as a `scan`.

![first call against T](pictures/first_call.png)

{markdown(first, ["process", "T", "dynamo_s", "snn_beyond_dynamo_s", "inductor_beyond_dynamo_s", "snn_scan_s"])}
{on_gpu}"""


def main() -> None:
    head, rest = README.read_text().split(START)
    README.write_text(f"{head}{START}\n{readme()}{STOP}{rest.split(STOP)[1]}")
    DOCUMENT.write_text(document())


if __name__ == "__main__":
    main()

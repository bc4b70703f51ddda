"""Write the committed results into the README, between its markers: ``python benchmarks/render.py``."""

from __future__ import annotations

import csv
from pathlib import Path

from _harness import RESULTS, markdown

README = Path(__file__).parent.parent / "README.md"
START, STOP = "<!-- measured -->", "<!-- /measured -->"


def read(name: str) -> list[dict[str, str]]:
    with (RESULTS / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def main() -> None:
    training, first = read("lif_training_cpu"), read("first_call")
    machine = training[0]
    steps = [{**r, "snn is faster by": r["snn_is_faster_by"], "of the floor": r["times_floor"]} for r in training if r["machine"]]
    memory = next(r["median_ms"] for r in training if r["what"].startswith("peak"))
    text = f"""One LIF layer, T=64, fp32, forward and backward; medians of one interleaved run, in ms. {machine["machine"]}, torch
{machine["torch"]}, {machine["date"]} (`benchmarks/lif_training.py`). The floor is five tensors of [T, N] read or written, taken
as 2.5 copies of one. Peak memory of that step is {memory} times x, spikes and their gradients.

{markdown(steps, ["N", "what", "median_ms", "snn is faster by", "of the floor"])}

First call, forward and backward, in seconds beyond Dynamo's own trace (`benchmarks/first_call.py`; a small negative number is
the spread of the trace):

{markdown(first, ["process", "T", "dynamo_s", "snn_beyond_dynamo_s", "inductor_beyond_dynamo_s"])}
"""
    columns = ["first_call_s", "step_ms", "speed_vs_eager"]
    text += f"""
Whole networks, a training step (`benchmarks/networks.py`), and recurrences that are more than pointwise (`benchmarks/stepped.py`;
Inductor is left out where its compilation takes very long; snn runs all of these as programs, `step_from=4`):

{markdown(read("networks_cpu"), ["network", "framework", *columns])}

{markdown(read("stepped_cpu"), ["recurrence", "framework", *columns])}
"""
    head, rest = README.read_text().split(START)
    README.write_text(f"{head}{START}\n{text}{STOP}{rest.split(STOP)[1]}")


if __name__ == "__main__":
    main()

"""What the benchmarks share: the contestants of a row behind one gate, interleaved medians, one row after the other."""

from __future__ import annotations

import argparse
import gc
import statistics
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from _device import CPU, SUFFIX, Clock, chosen, machine, synchronize
from _gate import Agreement, Limits, Refused, compiled
from _results import markdown, read, write
from torch import Tensor
from torch._dynamo.utils import counters

#: a call of a contestant: the output, then the gradients that it leaves
Step = Callable[[], Sequence[Tensor]]
T = TypeVar("T")
#: who must run for a row to say anything; of the others, those that are not installed or fail leave empty cells
REQUIRED = ("eager", "snn")
#: of a row; after `SECONDS`, no more than the fewest, which is enough for a median with a spread
ROUNDS, FEWEST_ROUNDS, SECONDS = {"cpu": 7, "cuda": 25}, 3, 6.0
#: seconds of a call from which on what the last one left in the caches is nothing
LONG = 1.0


def first_call(step: Callable[[], T], device: torch.device = CPU) -> tuple[T, float]:
    """What the step gives, and the seconds it takes: trace and compilation included, where it was never called before."""
    start = time.perf_counter()
    out = step()
    synchronize(device)
    return out, time.perf_counter() - start


@dataclass
class Contest:
    """The contestants of a row that run, how long their first calls took, and how far their results are from eager's."""

    device: torch.device
    steps: dict[str, Callable[[], object]] = field(default_factory=dict)
    first: dict[str, float] = field(default_factory=dict)
    agreement: dict[str, Agreement] = field(default_factory=dict)
    #: what the backend made of the row
    compiled: str = ""
    #: peers without a time, and why
    missing: dict[str, str] = field(default_factory=dict)

    def rows(self, row: dict[str, str], values: Callable[[str], dict[str, str]]) -> list[dict[str, str]]:
        """A CSV row of each contestant; a peer that did not run has empty cells for its `values(framework)`."""
        empty = dict.fromkeys(values("eager"), "")
        cells = {**{name: values(name) for name in self.first}, **dict.fromkeys(self.missing, empty)}
        about = {name: {"compiled": self.compiled if name == "snn" else "", **machine(self.device)} for name in cells}
        return [{**row, "framework": name, **found, **about[name]} for name, found in cells.items()]


def contest(makers: Mapping[str, Callable[[], Step]], device: torch.device, limits: Limits, who: str) -> Contest:
    """Compile and compare; raises `Refused` where the backend's results are not eager's. The second call is what is compared:
    the first may run other code than those that are timed."""
    torch._dynamo.reset()
    counters["snn_compile"].clear()
    made, expected = Contest(device), None
    for name, make in makers.items():
        try:
            step = make()
            _, first = first_call(step, device)
            results = [t.detach() for t in step()]
        except Exception as failure:
            if name in REQUIRED:
                raise
            made.missing[name] = f"{type(failure).__name__}: {str(failure).strip().partition(chr(10))[0]}"
            print(f"{who}, {name}: no time, {made.missing[name]}", flush=True)
            continue
        if expected is None:
            expected = results
        made.steps[name], made.first[name], made.agreement[name] = step, first, Agreement.of(results, expected)
    made.compiled = compiled(who)
    made.agreement["snn"].require(limits, f"{who}, snn")
    return made


def interleaved(
    functions: Mapping[str, Callable[[], object]], device: torch.device = CPU, rounds: int | None = None
) -> dict[str, list[float]]:
    """Seconds of a call in a row of calls, as in training; the functions take turns, so that a slow minute hits all of them.
    What takes seconds varies by little, and gets fewer rounds."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    clock, start = Clock(device), time.perf_counter()
    for done in range(rounds or ROUNDS[device.type]):
        if done >= FEWEST_ROUNDS and time.perf_counter() - start > SECONDS:
            break
        for name, function in functions.items():
            if not done or times[name][-1] < LONG:
                function()  # the caches and the allocator hold this function's data, not the last one's
            times[name].append(clock(function))
    return times


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in times.items()}


def step_cells(made: Contest, times: Mapping[str, list[float]], framework: str, digits: int) -> dict[str, str]:
    """The first call, a step and its spread, and how it compares with eager's."""
    milliseconds = {"step_ms": statistics.median, "min_ms": min, "max_ms": max}
    return {
        "first_call_s": f"{made.first[framework]:.1f}",
        **{name: f"{of(times[framework]) * 1e3:.{digits}f}" for name, of in milliseconds.items()},
        "speed_vs_eager": f"{statistics.median(times['eager']) / statistics.median(times[framework]):.1f}",
    }


def summary(times: list[float]) -> dict[str, str]:
    """Median, minimum and maximum in milliseconds."""
    found = {"median_ms": statistics.median(times), "min_ms": min(times), "max_ms": max(times)}
    return {name: f"{seconds * 1e3:.{2 if seconds >= 1e-3 else 4}f}" for name, seconds in found.items()}


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--device", choices=SUFFIX, default="cpu")
    parser.add_argument("--update", action="store_true", help="write the rows that are named: the others in the CSV file stay")
    parser.add_argument("names", nargs="*", help="only rows whose name contains one of these; not written without --update")
    return parser


def run(
    file: str,
    rows: Callable[[torch.device], Mapping[str, T]],
    measure: Callable[[str, T, torch.device], list[dict[str, str]]],
    columns: list[str],
    args: argparse.Namespace,
    key: int = 2,
) -> None:
    """Measure rows, print and write each as it comes; `key` columns name a row. One that fails or is refused does not cost the
    others theirs: it is said at the end, with exit code 1."""
    device = chosen(args.device)
    name, failed = f"{file}_{SUFFIX[device.type]}", []
    table = {tuple(r.values())[:key]: r for r in read(name)} if args.update else {}
    for label, row in rows(device).items():
        if args.names and not any(n in label for n in args.names):
            continue
        try:
            found = measure(label, row, device)
        except Exception as failure:
            if not isinstance(failure, Refused):
                traceback.print_exc()
            failed.append(f"{label}: {type(failure).__name__}: {failure}")
            continue
        finally:  # the next row finds the memory that this one held
            gc.collect()
            torch.cuda.empty_cache()
        print(markdown(found, columns), flush=True)
        table |= {tuple(r.values())[:key]: r for r in found}
        if args.update or not args.names:
            write(name, list(table.values()))
    if failed:
        raise SystemExit("\n".join(["Not measured:", *failed]))

"""What the Triton kernels compile to, without a GPU: registers, spills, widths of global accesses, contractions.

python benchmarks/triton_assembly.py      writes results/triton_assembly.csv
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import triton
from _device import machine
from _results import markdown, write

sys.path.insert(0, str(Path(__file__).parent.parent))  # the kernels and the reader are those of the tests
from tests.lowering.triton.assembly import DEVICES, compile_for
from tests.lowering.triton.cases import CASES, recurrence
from tests.lowering.triton.test_compiled import accesses, contiguous, fused, is_wide

NEURONS = ("lif", "parametric", "synaptic", "refractory")


def main() -> None:
    rows = []
    for name in NEURONS:
        for dtype in (torch.float32, torch.bfloat16):
            for direction in ("forward", "backward"):
                for device in DEVICES:
                    made = compile_for(device, contiguous(recurrence(CASES[name], dtype), direction))
                    found = accesses(made)
                    rows.append(
                        {
                            "neuron": name,
                            "dtype": str(dtype).removeprefix("torch."),
                            "direction": direction,
                            "device": device,
                            "registers": str(made.registers),
                            "spills": str(made.spills),
                            "global_accesses": str(len(found)),
                            "of_them_128_bits": str(sum(map(is_wide, found))),
                            "fused_multiply_adds": str(fused(made)),
                            "triton": triton.__version__,
                            **machine(),
                        }
                    )
    write("triton_assembly", rows)
    print(markdown(rows, list(rows[0])[:9]))


if __name__ == "__main__":
    main()

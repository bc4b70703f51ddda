"""All benchmarks, each in its own process, then the tables and pictures: ``make bench``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
NAMES = (
    *("neurons", "networks", "stepped", "spike_products", "open_neuromorphic"),
    *("lif_training", "first_call", "memory", "loss_curves"),
)


def main() -> None:
    for name in sys.argv[1:] or NAMES:
        print(f"\n## {name}\n", flush=True)
        subprocess.run([sys.executable, str(HERE / f"{name}.py")], check=True)
    if not sys.argv[1:]:
        for name in ("charts", "render"):
            subprocess.run([sys.executable, str(HERE / f"{name}.py")], check=True)


if __name__ == "__main__":
    main()

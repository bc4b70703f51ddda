"""What the pipeline made, as files and in PyTorch's logs."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from torch import fx
from torch._logging import getArtifactLogger

from snn_compile.ir.loop import loop_calls
from snn_compile.ir.recurrence import Recurrence
from snn_compile.ir.stepped import SteppedRecurrence
from snn_compile.ir.values import hint
from snn_compile.lowering.kernel_texts import kernel_texts, stepped_texts
from snn_compile.lowering.launch import Direction

log = logging.getLogger("snn_compile")
#: ``TORCH_LOGS=output_code`` shows the kernels beside Inductor's own output
kernel_log = getArtifactLogger("torch._inductor.snn_compile", "output_code")


class Dump:
    """``SNN_COMPILE_DUMP=dir``: the graph after every pass and the kernels, in files of this process's own."""

    count = 0

    def __init__(self, directory: str) -> None:
        self.directory = Path(directory) if directory else None
        if self.directory is not None:
            Dump.count += 1
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                log.warning("cannot write the dump: %s", error)
                self.directory = None
        self.graph = Dump.count

    def __call__(self, gm: fx.GraphModule, name: str) -> None:
        if self.directory is None:
            return
        text = [str(gm.graph)] + [str(loop) for _, loop in loop_calls(gm)]
        self._write(f"{name}.txt", "\n\n".join(text))

    def kernels(self, of: Recurrence | SteppedRecurrence) -> None:
        if self.directory is None and not kernel_log.isEnabledFor(logging.DEBUG):
            return
        for i, (direction, text) in enumerate(texts_for_logs(of)):
            kernel_log.debug("kernel of %s, %s:\n%s", of.name, direction, text)
            which = f"{direction}_{i}" if isinstance(of, SteppedRecurrence) else direction
            self._write(f"kernel_{of.name}_{which}.{'cpp' if of.meta['target'] == 'cpp' else 'py'}", text)

    def _write(self, name: str, text: str) -> None:
        if self.directory is None:
            return
        try:
            (self.directory / f"process_{os.getpid()}_graph_{self.graph}_{name}").write_text(text, "utf-8")
        except OSError as error:  # a full disk must not stop a compilation
            log.warning("cannot write the dump: %s", error)


def texts_for_logs(of: Recurrence | SteppedRecurrence) -> list[tuple[Direction, str]]:
    """The kernels as text; empty (and logged) where they cannot be written out."""
    try:
        if isinstance(of, SteppedRecurrence):
            return stepped_texts(of, of.meta["device"])
        return kernel_texts(of, of.meta["operands"], hint(of.meta["steps"]))
    except Exception:
        log.debug("no kernel texts for %s", of.name, exc_info=True)
        return []

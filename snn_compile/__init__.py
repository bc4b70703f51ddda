"""`torch.compile(model, backend="snn")`: plain Python time loops become one kernel."""

from snn_compile._version import __version__
from snn_compile.config import options
from snn_compile.errors import OptionError, Rejection, SnnCompileError

__all__ = ["OptionError", "Rejection", "SnnCompileError", "__version__", "options"]

"""`torch.compile(model, backend="snn")`: plain Python time loops become one kernel."""

from snn_compile._version import __version__
from snn_compile.config import options
from snn_compile.decompositions import register_decomposition
from snn_compile.errors import OptionError, Rejection, SnnCompileError
from snn_compile.explain import Explanation, explain
from snn_compile.fold import fold

__all__ = [
    "Explanation",
    "OptionError",
    "Rejection",
    "SnnCompileError",
    "__version__",
    "explain",
    "fold",
    "options",
    "register_decomposition",
]


def _register_backend() -> None:
    """From a source tree there is no entry point yet: register the backend by hand. (Twice would be an error.)"""
    from importlib.metadata import entry_points

    if any(e.name == "snn" for e in entry_points(group="torch_dynamo_backends")):
        return
    from torch._dynamo.backends.registry import register_backend

    from snn_compile.backend import snn

    register_backend(snn, name="snn")  # type: ignore[arg-type]


_register_backend()

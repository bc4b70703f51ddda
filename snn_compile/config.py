"""Options of ``torch.compile(..., backend="snn", options={...})``, and the only reader of environment variables."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from snn_compile.errors import OptionError


def _option(default: object, meaning: str, allowed: tuple[object, ...] | None = None):  # type: ignore[no-untyped-def]
    return field(default=default, metadata={"meaning": meaning, "allowed": allowed})


@dataclass(frozen=True)
class Config:
    """Options of this package; every other option is Inductor's."""

    enabled: bool = _option(True, "rewrite loops; False hands the graph to Inductor untouched", (True, False))
    strict: bool = _option(False, "raise on an internal failure of a pass instead of falling back", (True, False))
    batch_time: bool = _option(True, "run layers between neurons once over all steps, not step by step", (True, False))
    time_chunk: str | int = _option(
        "auto",
        "steps that inference runs at once; 'auto': as many as fit into twice eager's peak memory or 1 GiB, whichever is more",
    )
    fold_batch_norm: str = _option(
        "exact",
        "'threshold': a neuron with batch norm of its potential fires on the raw potential, where that is the same network",
        ("exact", "threshold"),
    )
    step_from: int = _option(
        32, "steps from which a recurrence with calls runs as a program; Inductor unrolls a shorter one, and fuses its reductions"
    )
    min_steps: int = _option(2, "the shortest loop that is rerolled, in equal iterations")
    dump: str = _option("", "directory for the graph after every pass and each kernel's source (SNN_COMPILE_DUMP)")


def options() -> dict[str, tuple[object, str]]:
    """Every option: its default and its meaning."""
    return {f.name: (f.default, f.metadata["meaning"]) for f in fields(Config)}


def parse_options(given: Mapping[str, object] | None) -> tuple[Config, dict[str, object]]:
    """Split `options=` into ours and Inductor's; an unknown name raises `OptionError` with what may have been meant."""
    own = {f.name: f for f in fields(Config)}
    values: dict[str, object] = {"dump": os.environ.get("SNN_COMPILE_DUMP", "")}
    inductor: dict[str, object] = {}
    known = _inductor_options()
    for name, value in (given or {}).items():
        if name in own:
            values[name] = _checked(own[name], value)
        elif name.replace("-", "_") in known:
            inductor[name.replace("-", "_")] = value
        else:
            near = difflib.get_close_matches(name, [*own, *known], n=3)
            meant = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise OptionError(
                f"unknown option {name!r}{meant} Options of backend='snn': {', '.join(own)}; all others are Inductor's "
                "(torch._inductor.list_options())"
            )
    return Config(**values), inductor  # type: ignore[arg-type]


def _checked(option, value: object) -> object:  # type: ignore[no-untyped-def]
    allowed = option.metadata["allowed"]
    if option.name == "time_chunk":
        if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
            return value
        raise OptionError(f"option 'time_chunk' is {value!r}; allowed: 'auto', or a number of steps")
    if allowed is not None and not any(value is a or (value == a and type(value) is type(a)) for a in allowed):
        raise OptionError(f"option {option.name!r} is {value!r}; allowed: {', '.join(map(repr, allowed))}")
    if allowed is None and type(value) is not type(option.default):
        raise OptionError(f"option {option.name!r} is {value!r}; it takes a {type(option.default).__name__}")
    if option.name in ("min_steps", "step_from") and value < 2:  # type: ignore[operator]
        raise OptionError(f"option {option.name!r} is {value!r}; allowed: 2 or more")
    return value


def _inductor_options() -> list[str]:
    import torch._inductor

    return list(torch._inductor.list_options())


def mode_options(mode: str | None) -> dict[str, object]:
    """Inductor's options for `mode=`."""
    if mode is None or mode == "default":
        return {}
    import torch._inductor

    return dict(torch._inductor.list_mode_options(mode))

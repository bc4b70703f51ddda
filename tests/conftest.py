"""Results are poisoned before every kernel.

Marks: `gpu` is skipped where there is no CUDA or ROCm device; `slow` is only a label (`-m "not slow"`)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from snn_compile.lowering import channels_last, launch, stepped
from snn_compile.lowering.cpp import direct_call
from snn_compile.lowering.cpp import target as cpp
from snn_compile.lowering.registration import NAMESPACE


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results hold NaN (integers: their largest value), scratch memory ones: what a kernel does not write shows."""

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*args: object) -> Tensor:
            result = allocate(*args)
            if result.dtype == torch.bool:
                return result
            return result.fill_(float("nan") if result.is_floating_point() else torch.iinfo(result.dtype).max)

        return run

    monkeypatch.setattr(launch.ResultSpec, "allocate", poisoned(launch.ResultSpec.allocate))
    for module in (channels_last, stepped):
        monkeypatch.setattr(module, "allocate", poisoned(module.allocate))
    monkeypatch.setattr(cpp, "allocate_scratch", lambda n: torch.full((n,), 255, dtype=torch.uint8))


@pytest.fixture(autouse=True, scope="session")
def poison_direct_calls() -> Iterator[None]:
    """Results that C++ allocates are all ones: NaN, or -1."""
    direct = direct_call.direct(NAMESPACE)
    if direct is None:
        yield
        return
    pointer, number, int32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    made_at = ctypes.POINTER(pointer)
    torch_, table = direct.torch, direct.torch.table(*direct_call.FUNCTIONS)
    kept = []

    def poison_results_of(name: str, result: int, *arguments: object) -> None:
        """`result`: the position of the argument that says where the new tensor goes."""
        function, at = ctypes.CFUNCTYPE(int32, *arguments), direct_call.FUNCTIONS.index(name)
        allocate = function(table[at])

        def poisoned(*args):  # type: ignore[no-untyped-def]
            failed = allocate(*args)
            if not failed:
                made, data, size = pointer(args[result][0]), pointer(), number()
                assert not torch_.library.aoti_torch_get_data_ptr(made, ctypes.byref(data))
                assert not torch_.library.aoti_torch_get_storage_size(made, ctypes.byref(size))
                ctypes.memset(data, 255, size.value)
            return failed

        kept.append(function(poisoned))
        table[at] = ctypes.cast(kept[-1], pointer)

    poison_results_of("aoti_torch_empty_strided", 6, number, pointer, pointer, int32, int32, int32, made_at)
    of_blob = (pointer, number, pointer, pointer, number, int32, int32, int32, made_at, int32, pointer, number, pointer, pointer)
    poison_results_of("torch_from_blob", 8, *of_blob)
    direct.set_functions(table)
    yield
    direct.set_functions(torch_.table(*direct_call.FUNCTIONS))


@pytest.fixture
def fresh() -> None:
    """Nothing compiled, nothing counted, the same random numbers."""
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)


@pytest.fixture
def op_by_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no kernel of ours runs as AOTAutograd traced it, and Inductor compiles nothing: for tests of what is found."""
    from torch._dynamo.backends.debugging import aot_eager
    from torch._inductor import compile_fx

    monkeypatch.setattr(compile_fx, "compile_fx", lambda gm, inputs, **_: aot_eager(gm, inputs))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():  # ROCm builds answer here too
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA or ROCm device"))

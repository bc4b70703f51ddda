"""Large results share no memory while anybody holds them, and give it back when nobody does."""

from __future__ import annotations

import gc

import pytest
import torch

from snn_compile.lowering import result_memory
from snn_compile.lowering.result_memory import PATIENCE, THRESHOLD, settle

LARGE = THRESHOLD // 4 + 5


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(result_memory, "blocks", result_memory._Blocks())


def fresh(n=LARGE):
    return settle(torch.empty(n))


def test_a_free_block_is_used_again():
    address = fresh().data_ptr()
    again = fresh()
    assert again.data_ptr() == address and again.shape == (LARGE,) and again.is_contiguous()


@pytest.mark.parametrize("hold", [lambda t: t, lambda t: t[7:9], lambda t: t.numpy(), lambda t: (t.view(-1, 1), 0)], ids=range(4))
def test_a_block_in_use_is_not(hold):
    first = fresh()
    address, held = first.data_ptr(), hold(first)
    del first
    assert fresh().data_ptr() != address
    del held
    gc.collect()
    assert address in {fresh().data_ptr() for _ in range(2)}


def test_a_saved_tensor_holds_its_block():
    x = fresh().fill_(3.0).requires_grad_()
    y = x * x  # saves x
    address = x.data_ptr()
    del x
    other = fresh()
    assert other.data_ptr() != address
    other.fill_(7.0)
    assert y.grad_fn is not None and float(y.grad_fn._saved_self[0]) == 3.0


def test_memory_shared_with_another_process_is_not_used_again():
    first = fresh().share_memory_()
    address = first.data_ptr()
    del first
    assert fresh().data_ptr() != address


def test_idle_blocks_are_dropped():
    fresh()
    for i in range(PATIENCE + 2):
        fresh(LARGE + 1 + i)
    assert len(result_memory.blocks) <= PATIENCE + 1


def test_strides_and_small_results():
    first = settle(torch.empty_strided((4, LARGE), (1, 4)))
    assert first.stride() == (1, 4)
    small = settle(torch.empty(16))
    assert small.numel() == 16 and len(result_memory.blocks) == 1

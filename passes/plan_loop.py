"""One loop to be: its window of nodes, its body, and which of its values are wanted outside."""

from __future__ import annotations

import torch
from torch import fx

from snn_compile.errors import Reject
from snn_compile.ir.loop import Loop, LoopCarry, LoopConst, LoopOutput
from snn_compile.ir.values import base_name, example, user_location, value_name
from snn_compile.passes.concatenations import stack_of
from snn_compile.passes.loop_body import LoopBody
from snn_compile.passes.loop_operands import series_name
from snn_compile.passes.loop_window import Window


class LoopPlan:
    """`loop`, and how its results take the place of the values of `window`. Raises `Reject`."""

    def __init__(self, window: Window, name: str) -> None:
        self.window = window
        window.check_writes()
        self.body = LoopBody(window)
        self.carries = [
            LoopCarry(base_name(c.placeholder.name.removeprefix("carry_")), example(c.placeholder))  # type: ignore[arg-type]
            for c in self.body.carries.values()
        ]
        self.outputs: list[LoopOutput] = []
        #: residue of a value that is wanted of every iteration -> its place in `outputs`
        self.output_of: dict[int, int] = {}
        #: residue of a value of which the last is wanted -> its place in `carries`
        self.final_of: dict[int, int] = {}
        for residue, by_step in sorted(window.uses.items()):
            self._want(residue, by_step)
        self.loop = self._make(name)

    def _want(self, residue: int, by_step: dict[int, list[fx.Node]]) -> None:
        window, stores, last = self.window, self.body.stores, self.window.last(residue)
        if not isinstance(example(self.body.values[residue]), torch.Tensor):
            raise Reject("a value of the loop that is not a tensor is used outside", node=window.node(residue, 0))
        if residue in stores:
            if set(by_step) != {window.count - 1}:
                raise Reject("a buffer is used before the loop has filled it")
            dim, _, reverse = stores[residue]
            self._want_output(residue, dim, reverse)
        elif set(by_step) == {last} and last == window.count - 1:
            self._want_final(residue)
        else:
            self._want_output(residue, self._stack_dim(residue, by_step), False)
            is_result = any(user.op == "output" for user in by_step.get(window.count - 1, ()))
            if is_result and self._carried(residue) is not None:  # (a slice would share memory with the value of all steps)
                self._want_final(residue)

    def _carried(self, residue: int) -> int | None:
        """The place among the carries of a value that the next iteration reads."""
        return next((i for i, c in enumerate(self.body.carries.values()) if (c.residue, c.back) == (residue, 1)), None)

    def _want_final(self, residue: int) -> None:
        known = self._carried(residue)
        if known is None:
            value = self.body.values[residue]
            self.body.add_carry(residue)
            self.carries.append(LoopCarry(base_name(value.name), example(value)))  # type: ignore[arg-type]
        self.final_of[residue] = len(self.carries) - 1 if known is None else known
        self.carries[self.final_of[residue]].is_result = True

    def _want_output(self, residue: int, dim: int, reverse: bool) -> None:
        value = example(self.body.values[residue])
        assert isinstance(value, torch.Tensor)
        if residue in self.window.growing:
            raise Reject(
                "a value that has another shape in the first step than in all others is used outside the loop",
                node=self.window.node(residue, 0),
                hint="start the states in the shape that they have later",
            )
        if residue not in self.body.stores and self.window.is_written_later(residue):  # (all steps will share memory)
            raise Reject(
                "a value of a step is written into after the loop",
                node=self.window.node(residue, 0),
                location=user_location(self.window.node(residue, 0)),
                hint="write into a copy of it: y[t].clone()",
            )
        self.output_of[residue] = len(self.outputs)
        name = value_name(self.window.node(residue, self.window.template))
        self.outputs.append(LoopOutput(name, value, dim, reverse))

    def _stack_dim(self, residue: int, by_step: dict[int, list[fx.Node]]) -> int:
        """The dim along which the steps' values are stacked, so that the loop lays them out that way."""
        value = example(self.body.values[residue])
        for user in by_step.get(0, ()):
            dim = stack_of(user)
            if dim is not None and isinstance(value, torch.Tensor):
                return dim[1] % (value.dim() + 1)
        return 0

    def _make(self, name: str) -> Loop:
        body = self.body.module([self.body.values[residue] for residue in self.output_of])
        xs = [spec for spec, _, _ in self.body.inputs]
        consts = [LoopConst(series_name(n), example(n)) for n in self.body.consts]
        place = user_location(self.window.representative())
        return Loop(name, self.window.count, body, self.carries, xs, consts, self.outputs, place)

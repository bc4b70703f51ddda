"""A captured graph is copied into another one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from snn_compile.ir.values import example
from snn_compile.passes.autocast_regions import Regions, put_into, regions, under
from snn_compile.passes.emit import fake_mode_of


class Inliner(fx.Interpreter):
    """Copies `graph` to where nodes are inserted in `gm`, in the place of `node`, with examples of the graph it goes into.

    What is copied counts as written where `node` was; `keeps_places`: where it was written itself. It stands in the regions of
    autocast of `node`, or in `where`.
    """

    def __init__(
        self, graph: fx.GraphModule, gm: fx.GraphModule, node: fx.Node, keeps_places: bool = False, where: Regions | None = None
    ) -> None:
        super().__init__(graph)
        self.keeps_places = keeps_places
        self.source, self.gm, self.node = graph.graph, gm, node
        self.where = regions(node) if where is None else where
        self.copies: dict[fx.Node, Any] = {}
        self.attributes: dict[str, str] = {}

    def inline(self, inputs: Sequence[Any]) -> Any:
        """The graph's results, in their structure, as nodes of `gm`, given its inputs as nodes of `gm` (or numbers)."""
        placeholders = [n for n in self.source.nodes if n.op == "placeholder"]
        self.copies = dict(zip(placeholders, inputs, strict=True))
        with fake_mode_of(inputs), under(self.where):
            self.run(*map(example, inputs))
        return fx.node.map_arg(self.source.output_node().args[0], self.copies.__getitem__)

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        if n.op not in ("placeholder", "output"):
            self.copy(n, value)
        return value

    def copy(self, n: fx.Node, value: object) -> None:
        new = self.gm.graph.node_copy(n, self.copies.__getitem__)
        if n.op == "get_attr":
            new.target = self._attribute(str(n.target), value)
        place = (n.meta.get("stack_trace") if self.keeps_places else "") or self.node.meta.get("stack_trace", "")
        new.meta = {"example_value": value, "stack_trace": place}
        put_into(new, self.where)
        self.copies[n] = new

    def _attribute(self, name: str, value: object) -> str:
        """`value` as an attribute of the graph it goes into, once a call."""
        if name not in self.attributes:
            i = 0
            while hasattr(self.gm, f"inlined_{i}"):
                i += 1
            self.attributes[name] = f"inlined_{i}"
            setattr(self.gm, self.attributes[name], value)
        return self.attributes[name]

"""Loop-invariant work runs once.

    for t: s, v = step(v, x[t], w.exp().view(1, -1, 1, 1))
    ->  w1 = w.exp().view(1, -1, 1, 1)
        for t: s, v = step(v, x[t], w1)

An op moves out when it is pure, draws no random numbers, and depends on nothing but the loop's constants. Pointwise ops
that only feed one recurrence stay: its kernel computes them once before its time loop anyway, with the arithmetic of eager.
"""

from __future__ import annotations

from torch import fx

from snn_compile.ir.loop import Loop, LoopConst
from snn_compile.ir.values import base_name, example, storage_key
from snn_compile.passes.classify import OpInfo
from snn_compile.passes.distribute import find_groups


def find_invariant(loop: Loop, infos: dict[fx.Node, OpInfo]) -> set[fx.Node]:
    """Ops of the body that depend on constants only and are pure."""
    n_varying = len(loop.carries) + len(loop.xs)
    varying = set(loop.placeholders()[:n_varying])
    written = {storage_key(w) for info in infos.values() for w in info.writes} - {None}
    invariant: set[fx.Node] = set()
    for node, info in infos.items():
        inputs = [i for i in node.all_input_nodes if i.op != "get_attr"]
        if not info.pure or any(storage_key(n) in written for n in (node, *inputs)):
            continue
        if not any(i in varying or (i in infos and i not in invariant) for i in inputs):
            invariant.add(node)
    return invariant


def hoist(gm: fx.GraphModule, call: fx.Node, loop: Loop, infos: dict[fx.Node, OpInfo]) -> int:
    """Move invariant work of `loop` before `call`; gives the number of ops moved."""
    moved = _to_move(loop, infos)
    if not moved:
        return 0
    placeholders = loop.placeholders()
    outside: dict[fx.Node, fx.Node] = dict(zip(placeholders, call.args, strict=True))  # type: ignore[arg-type]
    new_consts: list[fx.Node] = []
    last = placeholders[-1] if placeholders else loop.body.graph._root
    kept = [n for n in infos if n not in moved]
    needed = {i for n in kept for i in n.all_input_nodes} | set(loop.body.graph.output_node().all_input_nodes)
    for node in (n for n in infos if n in moved):
        with gm.graph.inserting_before(call):
            outside[node] = _copy_out(gm, loop, node, outside)
        if node in needed:
            with loop.body.graph.inserting_after(last):
                placeholder = loop.body.graph.placeholder(f"const_{base_name(node.name)}")
            placeholder.target = placeholder.name
            placeholder.meta = dict(node.meta)
            last = placeholder
            node.replace_all_uses_with(placeholder, delete_user_cb=lambda u: u not in moved)
            loop.consts.append(LoopConst(base_name(node.name), example(node)))
            new_consts.append(outside[node])
    for node in reversed([n for n in infos if n in moved]):
        loop.body.graph.erase_node(node)
        del infos[node]
    call.args = (*call.args, *new_consts)
    loop.body.recompile()
    return len(moved)


def _to_move(loop: Loop, infos: dict[fx.Node, OpInfo]) -> set[fx.Node]:
    """Invariant ops that no kernel takes in, and all they depend on."""
    invariant = find_invariant(loop, infos)
    in_kernel = {n for g in find_groups(loop, infos) if g.is_kernel for n in g.nodes}
    moved: set[fx.Node] = set()
    for node in reversed(list(infos)):
        if node in invariant and (node not in in_kernel or any(u in moved for u in node.users)):
            moved.add(node)
    return moved


def _copy_out(gm: fx.GraphModule, loop: Loop, node: fx.Node, outside: dict[fx.Node, fx.Node]) -> fx.Node:
    def argument(n: fx.Node) -> fx.Node:
        if n.op == "get_attr":
            name = f"{loop.name}_{n.target}"
            if not hasattr(gm, name):
                gm.add_submodule(name, getattr(loop.body, str(n.target)))
            return gm.graph.get_attr(name)
        return outside[n]

    return gm.graph.node_copy(node, argument)

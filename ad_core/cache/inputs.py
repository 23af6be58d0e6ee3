"""The placeholders of a cached graph: created where a cached op asks for them, and listed in the layout in order."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch
from torch.fx import GraphModule, Node

from ad_core.api.batch import FIELDS, GROUPED_FIELDS
from ad_core.api.errors import GraphInvalidError
from ad_core.api.mixer import Kernel
from ad_core.api.resources import Resource
from ad_core.api.types import OpCall
from ad_core.cache.layout import BufferInput, CacheLayout, FieldInput, IdsInput, Input, PoolInput, Preparation


class GraphInputs:
    """Adds placeholders to `graph` and knows what each one is. `settle` writes them to the layout."""

    def __init__(self, graph: GraphModule, layout: CacheLayout):
        self._graph, self._layout = graph.graph, layout
        self._kinds: dict[Node, Input] = {}
        self._fields: dict[tuple[str, int], Node] = {}
        self._pools: dict[tuple[Node, str], Node] = {}
        self._buffers: dict[Hashable, Mapping[str, Node]] = {}
        placeholders = [node for node in self._graph.nodes if node.op == "placeholder"]
        self._canonical = {str(node.target): node for node in placeholders}
        self._first = placeholders[-1].next

    def pack_canonical(self) -> None:
        """The canonical inputs become packed ones: ids stay [1, T], positions come from the batch, and batch fields that an
        earlier pass asked for are taken over."""
        for name, node in self._canonical.items():
            if name == "input_ids":
                self._kinds[node] = IdsInput()
            elif name in FIELDS:
                self._kinds[node] = FieldInput(name)
                self._fields[name, 0] = node
            elif name == "position_ids":
                positions = self.field("positions", 0)
                with self._graph.inserting_before(self._first):
                    row = self._graph.call_function(torch.ops.aten.unsqueeze.default, (positions, 0))
                row.meta = {key: value for key, value in node.meta.items() if key == "val"}
                node.replace_all_uses_with(row)
                self._graph.erase_node(node)
            else:
                raise GraphInvalidError(
                    f"the canonical graph has an input {name!r} that no batch can give", hint="inputs are input_ids and position_ids"
                )

    def field(self, name: str, group: int) -> Node:
        """The placeholder of a batch field."""
        key = (name, group if name in GROUPED_FIELDS else 0)
        if key not in self._fields:
            label = f"{name}_{group}" if name in GROUPED_FIELDS else name
            self._fields[key] = self._new(label, FieldInput(*key))
        return self._fields[key]

    def pool(self, owner: Node, name: str, resource: Resource, group: int) -> Node:
        """The pool that `owner` keeps under `name`."""
        if (owner, name) not in self._pools:
            label = f"pool_{len(self._pools)}_{name}"
            self._pools[owner, name] = self._new(label, PoolInput(label, resource, group))
        return self._pools[owner, name]

    def buffers(self, kernel: Kernel, call: OpCall, group: int) -> Mapping[str, Node]:
        """The kernel's own tensors: one set for all its calls with an equal group key in one page group."""
        specs = kernel.buffers(call, self._layout.limits)
        if not specs:
            return {}
        key = (kernel.name, kernel.group_key(call), group)
        if key not in self._buffers:
            index = len(self._layout.preparations)
            self._layout.preparations.append(Preparation(kernel, call, max(group, 0), specs))
            self._buffers[key] = {name: self._new(f"buffer_{index}_{name}", BufferInput(index, name, spec)) for name, spec in specs.items()}
        return self._buffers[key]

    def settle(self) -> None:
        """Removes what nothing reads and lists the rest in the layout, in the order of the placeholders."""
        self._graph.eliminate_dead_code()
        for node in [node for node in self._kinds if not node.users and not isinstance(self._kinds[node], IdsInput)]:
            self._graph.erase_node(node)
            del self._kinds[node]
        self._graph.lint()
        self._layout.inputs = [self._kinds[node] for node in self._graph.nodes if node.op == "placeholder"]

    def _new(self, name: str, kind: Input) -> Node:
        with self._graph.inserting_before(self._first):
            node = self._graph.placeholder(name)
        self._kinds[node] = kind
        return node

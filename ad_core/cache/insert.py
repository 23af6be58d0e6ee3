"""The one insertion pass: canonical ops become cached ops, whatever the mixer."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.fx import GraphModule, Node

from ad_core.api.errors import OpDefinitionError
from ad_core.api.mixer import CanonicalOp, Kernel, Mixer
from ad_core.api.passes import Pass, PassContext, PassReport
from ad_core.api.resources import PagedTokens, Resource
from ad_core.api.types import Limits, OpCall, Stage
from ad_core.cache.binding import bind_by_name
from ad_core.cache.inputs import GraphInputs
from ad_core.cache.layout import SLOTS, CacheLayout, resource_bytes
from ad_core.graph.calls import bound_arguments, op_call
from ad_core.graph.ops import find_op, qualified_name
from ad_core.plan import Plan, ResourceEntry


@dataclass(frozen=True)
class Served:
    """A canonical op that may occur, and the options of the plugin that owns it."""

    op: CanonicalOp
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class _Site:
    """One canonical call in the graph. `owner` is the call that keeps (and appends to) the memory: the site's own, or an
    earlier one's with the same key and value nodes."""

    node: Node
    call: OpCall
    owner: Node
    resources: Mapping[str, Resource] = field(hash=False)


class InsertCaches(Pass):
    """Replaces every canonical op by the cached op of the kernel that wins, and gives the graph its new inputs.

    `choose` arbitrates between kernels and records the decision. After the run `layout` tells what each placeholder is. The
    graph then computes on packed tokens [1, T]; the fake values in its metas still have the canonical shapes.
    """

    name = "core.insert_caches"
    stage = Stage.CACHE
    safety = "reordered"

    def __init__(self, served: Sequence[Served], choose: Callable[[OpCall], Kernel | None], limits: Limits, plan: Plan):
        self._served = {qualified_name(entry.op.op): entry for entry in served}
        self._choose, self._plan = choose, plan
        self.layout = CacheLayout(limits)

    def run(self, graph: GraphModule, context: PassContext) -> PassReport:
        sites = self._sites(graph)
        windows = {r.window for site in sites for r in site.resources.values() if isinstance(r, PagedTokens)}
        self.layout.windows = tuple(sorted(windows, key=lambda window: (window is not None, window or 0)))
        inputs = GraphInputs(graph, self.layout)
        inputs.pack_canonical()
        replaced = sum(self._insert(site, inputs) for site in sites)
        inputs.settle()
        self._record(sites)
        return PassReport(matched=replaced)

    def _sites(self, graph: GraphModule) -> list[_Site]:
        """Every canonical call; memory keys are taken before any node is replaced."""
        owners: dict[Hashable, Node] = {}
        sites = []
        for node in graph.graph.nodes:
            served = self._served.get(qualified_name(node.target))
            if served is None:
                continue
            call, key = op_call(node), node
            resources: Mapping[str, Resource] = {}
            if isinstance(served.op, Mixer):
                resources = served.op.resources(call, served.options)
                arguments = bound_arguments(node)
                key = tuple(arguments[name] for name in served.op.sharing_key(call)) or node
            sites.append(_Site(node, call, owners.setdefault(key, node), resources))
        return sites

    def _insert(self, site: _Site, inputs: GraphInputs) -> bool:
        kernel = self._choose(site.call)
        if kernel is None:  # a canonical op without memory and without kernels computes itself
            return False
        node, group = site.node, self._page_group(site)
        op = find_op(kernel.op)
        args, kwargs = bind_by_name(
            op,
            call=bound_arguments(node),
            resources={
                name: inputs.pool(site.owner, name, resource, group if isinstance(resource, PagedTokens) else SLOTS)
                for name, resource in site.resources.items()
            },
            buffers=inputs.buffers(kernel, site.call, group),
            append=site.owner is node,
            field=lambda name: inputs.field(name, max(group, 0)),
        )
        with node.graph.inserting_before(node):
            cached = node.graph.call_function(op, args, kwargs)
        cached.meta = dict(node.meta)
        node.replace_all_uses_with(cached)
        node.graph.erase_node(node)
        return True

    def _page_group(self, site: _Site) -> int:
        windows = {resource.window for resource in site.resources.values() if isinstance(resource, PagedTokens)}
        if len(windows) > 1:
            raise OpDefinitionError(
                f"the paged resources of {site.call.op} have different windows: {sorted(map(str, windows))}",
                where=site.call.module or site.call.node,
                hint="a call's pages belong to one page group: give them the widest window",
            )
        return self.layout.windows.index(windows.pop()) if windows else SLOTS

    def _record(self, sites: Sequence[_Site]) -> None:
        for site in sites:
            if site.owner is not site.node:
                continue
            sharers = tuple(other.call.node for other in sites if other.owner is site.node and other is not site)
            for name, resource in site.resources.items():
                paged = isinstance(resource, PagedTokens)
                self._plan.resources.append(
                    ResourceEntry(
                        name=name,
                        node=site.call.node,
                        kind="pages" if paged else "slots",
                        shape=tuple(
                            int(extent) for extent in (resource.per_token if isinstance(resource, PagedTokens) else resource.shape)
                        ),
                        dtype=str(resource.dtype).removeprefix("torch."),
                        unit_bytes=resource_bytes(resource),
                        window=resource.window if isinstance(resource, PagedTokens) else None,
                        shared_by=sharers,
                        every=resource.every if isinstance(resource, PagedTokens) else 1,
                    )
                )

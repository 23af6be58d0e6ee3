"""Runs the passes: in order, each with its report in the plan, and if asked checked after each."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from ad_core.api.errors import AdError, GraphInvalidError, PluginBrokenError
from ad_core.api.passes import Pass, PassContext, PassReport
from ad_core.api.types import Stage
from ad_core.graph.ops import qualified_name
from ad_core.graph.verify import verify_graph
from ad_core.passes.guard import Inert, NumericGuard, Sample
from ad_core.passes.order import PassOffer, ordered
from ad_core.plan import PassEntry, Plan

SIZE_LIMIT = 2 << 30
"""Bytes of weights above which the numeric guard is inert."""


class PassManager:
    """All passes of one pipeline. `offers` are (pass, distribution, options); `plan` gets an entry for every pass that ran or was skipped.

    With `verify` the graph is held against its spec (`ad_core.graph.verify`) after every pass, and below `size_limit` bytes of weights its
    numbers against those before the pass. Raises `PassOrderError` or `PluginConflictError` for passes that cannot be ordered.
    """

    def __init__(
        self,
        offers: Sequence[tuple[Pass, str, Mapping[str, Any]]],
        plan: Plan,
        *,
        verify: bool = False,
        size_limit: int = SIZE_LIMIT,
    ):
        self.order = ordered([PassOffer(*offer) for offer in offers])
        self._plan, self._verify = plan, verify
        self._guard = NumericGuard(size_limit)

    def run(self, graph: GraphModule, stages: Stage | Iterable[Stage], *, device: torch.device, dtype: torch.dtype | None = None) -> None:
        """Runs the passes of one stage, or of several in their order, over `graph`, which they change in place.

        Raises `GraphInvalidError` or `NumericGuardError` that name the pass that did it, and `PluginBrokenError` for a pass that raises.
        """
        wanted = [stages] if isinstance(stages, Stage) else sorted(stages)
        before: Sample | Inert | None = None
        for stage in wanted:
            for offer in self.order:
                if offer.stage is not stage:
                    continue
                missing = _missing_ops(offer.offered, graph)
                if missing is not None:
                    self._record(offer, PassReport(notes=[missing]), "")
                    continue
                if self._verify and before is None:
                    before = self._guard.first(graph)
                report = self._run_one(offer, graph, PassContext(device, dtype, offer.options))
                verdict = "off"
                if self._verify:
                    verify_graph(graph, stage, after=offer.name)
                    assert before is not None
                    before, verdict = self._guard.compare(
                        before, graph, name=offer.name, distribution=offer.distribution, safety=offer.offered.safety
                    )
                    self._say_inert(offer, verdict)
                self._record(offer, report, verdict)
            if self._verify:
                verify_graph(graph, stage)
        graph.recompile()  # once: writing the code of a large graph takes longer than most passes

    def _run_one(self, offer: PassOffer, graph: GraphModule, context: PassContext) -> PassReport:
        start = time.perf_counter()
        try:
            report = offer.offered.run(graph, context)
        except AdError:
            raise
        except Exception as error:
            raise PluginBrokenError(
                f"the pass {offer.name} raised {type(error).__name__}",
                where=f"pass {offer.name} of {offer.distribution}, stage {offer.stage.name}",
                why=str(error),
                hint=f"report it to {offer.distribution}, or deny its plugin",
            ) from error
        if not isinstance(report, PassReport):
            raise PluginBrokenError(f"the pass {offer.name} returned no PassReport", where=f"pass {offer.name} of {offer.distribution}")
        try:
            graph.graph.lint()
        except RuntimeError as error:
            raise GraphInvalidError(
                f"the pass {offer.name} left a graph that is not well formed",
                where=f"pass {offer.name} of {offer.distribution}",
                why=str(error),
            ) from error
        if self._verify:
            graph.recompile()
        report.seconds = time.perf_counter() - start
        return report

    def _say_inert(self, offer: PassOffer, verdict: str) -> None:
        """Once for each reason, where a reader of the plan looks for what did not work."""
        note = f"numeric guard {verdict}"
        if verdict.startswith("inert") and not any(each.startswith(note) for each in self._plan.notes):
            self._plan.notes.append(f"{note} (first at the pass {offer.name})")

    def _record(self, offer: PassOffer, report: PassReport, guard: str) -> None:
        self._plan.passes.append(
            PassEntry(
                name=offer.name,
                stage=offer.stage.name,
                distribution=offer.distribution,
                matched=report.matched,
                declined=tuple(report.declined),
                notes=tuple(report.notes),
                seconds=report.seconds,
                guard=guard,
            )
        )


def _missing_ops(offered: Pass, graph: GraphModule) -> str | None:
    """Why the pass has nothing to do here, or None."""
    if not offered.requires_ops:
        return None
    present = {qualified_name(node.target) for node in graph.graph.nodes if node.op == "call_function"}
    if present & set(offered.requires_ops):
        return None
    return f"skipped: the graph has no {' or '.join(offered.requires_ops)}"

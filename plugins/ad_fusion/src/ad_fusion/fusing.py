"""What every fusion is: a pass that finds operations around an anchor and puts one op in their place, on the CPU."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from ad_core.api import Pass, PassContext, PassReport, Stage
from ad_core.graph.edit import insert_call, is_op, replace


@dataclass(frozen=True)
class Found:
    """Operations that end in `last`, and the arguments of the op that computes the same. `why_not` says why they are left all the same."""

    last: Node
    arguments: tuple[Any, ...]
    why_not: str | None = None


class Fusion(Pass):
    """`op` takes the place of what `find` finds around each call of `anchor`."""

    stage = Stage.COMPILE
    before = ("core.prepack",)
    safety = "reordered"
    op: OpOverload
    anchor: str

    @abstractmethod
    def find(self, node: Node) -> Found | None:
        """What belongs to this call of the anchor."""

    def run(self, graph: GraphModule, context: PassContext) -> PassReport:
        report = PassReport()
        if context.device.type != "cpu":
            report.declined.append(f"the model runs on {context.device}: {self.op} is the CPU's")
            return report
        for node in list(graph.graph.nodes):
            found = self.find(node) if is_op(node, self.anchor) else None
            if found is None:
                continue
            if found.why_not is not None:
                report.declined.append(f"{node.name}: {found.why_not}")
                continue
            replace(found.last, insert_call(found.last, self.op, *found.arguments))
            report.matched += 1
        graph.graph.eliminate_dead_code()
        return report


def called(value: object, *ops: str) -> Node | None:
    """The node, if it calls one of the ops and is read once."""
    return value if isinstance(value, Node) and is_op(value, *ops) and len(value.users) == 1 else None


def only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def other_factor(product: Node, one: Node) -> Node | None:
    """What `one` is multiplied by, if that is not `one` itself and no constant."""
    first, second = product.args[:2]
    other = second if first is one else first
    return other if isinstance(other, Node) and other is not one else None

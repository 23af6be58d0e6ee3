"""What both passes ask of a graph's nodes."""

from __future__ import annotations

from torch.fx import Node

from ad_core.graph.edit import is_op


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

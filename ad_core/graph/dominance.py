"""Which node every path from a node to the output passes next."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node


def immediate_post_dominators(order: Sequence[Node]) -> dict[Node, Node]:
    """For every node of `order` (live nodes in graph order, the output last) the nearest one that all paths to the output pass."""
    place = {node: index for index, node in enumerate(order)}
    found: dict[Node, Node] = {}
    for node in reversed(order[:-1]):
        meeting: Node | None = None
        for user in node.users:
            if user not in place:
                continue
            if meeting is None:
                meeting = user
            while meeting is not user:  # climb from whichever is further from the output until the two meet
                if place[meeting] < place[user]:
                    meeting = found[meeting]
                else:
                    user = found[user]
        if meeting is not None:
            found[node] = meeting
    return found

"""Graphs: defining ops, reading calls, small edits, the written spec, and the search for what mixes tokens."""

from ad_core.graph.ops import define_op, find_op

__all__ = ["define_op", "find_op"]

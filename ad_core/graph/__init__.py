"""Graphs: defining ops, reading calls, small edits, the written spec, and the search for what mixes tokens."""

"""Requests, scheduling and sampling over an executor. It knows a compiled model as rows in, logits out, and no graphs."""

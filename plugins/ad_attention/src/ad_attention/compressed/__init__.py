"""Compressed attention: blocks of tokens are summed up in an entry each, and attention is over recent tokens and entries."""

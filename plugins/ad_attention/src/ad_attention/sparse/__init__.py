"""Attention over a choice of tokens: a small indexer scores all that came before and takes the best, attention reads only these."""

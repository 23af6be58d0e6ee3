"""Causal convolutions over the sequence, as a plugin of ad-core."""

"""Attention over a latent (MLA): keys and values of all heads are one linear of a small vector a token, and only that is kept."""

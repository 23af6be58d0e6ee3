"""Routed experts, as a plugin of ad-core."""

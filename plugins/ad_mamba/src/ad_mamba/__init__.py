"""Selective state spaces: selective scan (Mamba-1) and SSD (Mamba-2), as a plugin of ad-core."""

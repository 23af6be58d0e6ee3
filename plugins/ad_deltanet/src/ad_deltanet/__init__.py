"""Delta rules: plain, gated by head and gated by channel, as a plugin of ad-core."""

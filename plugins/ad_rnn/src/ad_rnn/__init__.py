"""Recurrences by channel: RG-LRU, RWKV-4, as a plugin of ad-core."""

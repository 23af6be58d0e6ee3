"""Checkpoint schemes. The plugin module is `ad_quant.plugin`."""

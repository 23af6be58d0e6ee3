"""Softmax attention in all its forms. The plugin module is `ad_attention.plugin`."""

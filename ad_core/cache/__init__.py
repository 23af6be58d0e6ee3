"""What mixers keep between steps: batch metadata, pools, pages and slots, prefixes, and the one insertion pass."""

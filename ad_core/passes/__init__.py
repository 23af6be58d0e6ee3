"""The pass manager, and the core's own passes."""

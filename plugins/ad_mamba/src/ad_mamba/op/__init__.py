"""The canonical ops of the two generations of Mamba."""

"""The cached forms of the canonical op, one file a backend."""

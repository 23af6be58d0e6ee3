"""The cached forms of the canonical ops, one file a backend."""

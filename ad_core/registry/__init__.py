"""Which plugins there are, which of them can be used, and who wins when several offer the same."""

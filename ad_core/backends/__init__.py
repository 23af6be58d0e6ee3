"""Compile backends: from the last graph to something callable."""

"""Keeps what was measured and decided."""

"""Lanes: real engines' own parsers and config classes, installed on demand, that exports are checked against."""

"""Keeps what was measured and decided; `lookup` answers a deploy script from it."""

from tuner.deploy.lookup import Found, Question, lookup

__all__ = ["Found", "Question", "lookup"]

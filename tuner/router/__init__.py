"""The domain of a request from its text; see `tuner.router.router`."""

from tuner.router.router import Router, load, train

__all__ = ["Router", "load", "train"]

"""Choose the speculative-decoding setup of every round at run time; `tuner.selector.selector` shows a serving loop."""

from profiles.engines.base import RequestInfo, RoundDecision, RoundReport
from tuner.policy.policy import read as read_policy
from tuner.selector.policy_file import PolicyFile
from tuner.selector.selector import Selector, SelectorStats

__all__ = ["PolicyFile", "RequestInfo", "RoundDecision", "RoundReport", "Selector", "SelectorStats", "read_policy"]

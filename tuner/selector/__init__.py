"""Choose the speculative-decoding setup of every round at run time.

Example:
    selector = Selector(read_policy("policy.json"))
    decision = selector.choose(batch_size=1, context_length=300, domain="code")
    ...  # decode a round with decision.setup
    selector.observe(RoundReport(decision, ((proposed, accepted),), seconds))
"""

from profiles.engines.base import RequestInfo, RoundDecision, RoundReport
from tuner.policy.policy import read as read_policy
from tuner.selector.policy_file import PolicyFile
from tuner.selector.selector import Selector, SelectorStats

__all__ = ["PolicyFile", "RequestInfo", "RoundDecision", "RoundReport", "Selector", "SelectorStats", "read_policy"]

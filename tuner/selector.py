"""Chooses the setup for a request at run time from a policy, in microseconds.

Serving code imports this: it does no I/O and loads nothing heavy. The rule itself is `Policy.look_up`; here are only
its answers, worked out beforehand, so it must not know why a choice was made.
"""

from bisect import bisect_left
from itertools import product

from profiles.terms import PLAIN, Setup
from tuner.policy import MIXED, Policy, check_asked, match_temperature


class Selector:
    """Answers `choose` from a table of the policy's answers; it never changes, so threads may share it."""

    def __init__(self, policy: Policy) -> None:
        choices = policy.choices
        self.policy = policy
        self._temperatures = sorted({choice.temperature for choice in choices})
        self._domains = frozenset(choice.domain for choice in choices)
        self._batches = sorted({choice.batch_size for choice in choices})
        self._contexts = sorted({choice.context_length for choice in choices})
        # between two measured batches, or contexts, the rule's answer does not change
        questions = product(self._batches, [*self._contexts, None], self._domains, self._temperatures)
        self._setups = {question: self._ask(*question) for question in questions}

    def choose(
        self,
        *,
        batch_size: int = 1,
        context_length: int | None = None,
        domain: str | None = None,
        temperature: float = 0.0,
    ) -> Setup:
        """The setup to decode with; `context_length` in tokens of prompt plus output, None when it is not known.

        The rule is that of `Policy.look_up`, which also says how it was found. Raises: InputError: an impossible value.
        """
        check_asked(batch_size, context_length, temperature)
        measured = match_temperature(self._temperatures, temperature)
        batch = bisect_left(self._batches, batch_size)
        context = 0 if context_length is None else bisect_left(self._contexts, context_length)
        if measured is None or batch == len(self._batches) or context == len(self._contexts):
            return PLAIN
        shown = None if context_length is None else self._contexts[context]
        source = domain if domain in self._domains else MIXED
        return self._setups[self._batches[batch], shown, source, measured]

    def _ask(self, batch_size: int, context_length: int | None, domain: str, temperature: float) -> Setup:
        answer = self.policy.look_up(
            batch_size=batch_size, context_length=context_length, domain=domain, temperature=temperature
        )
        return answer.choice.setup

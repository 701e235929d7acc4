"""The policy's answers to every question, worked out beforehand: a look-up that takes a microsecond.

The rule itself is `Policy.look_up`; here are only its answers, so this must not know why a choice was made or what is
done with it.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import product

from tuner.policy.query import MIXED, check_asked, match_temperature

TYPE_CHECKING = False  # that of `typing`, which is not worth its import in serving code
if TYPE_CHECKING:
    from tuner.policy.policy import Choice, Policy


class Table:
    """Answers from the choices of one policy; it never changes, so threads may share it."""

    def __init__(self, policy: Policy) -> None:
        choices = policy.choices
        self._policy = policy
        self._temperatures = sorted({choice.temperature for choice in choices})
        self._domains = frozenset(choice.domain for choice in choices)
        self._batches = sorted({choice.batch_size for choice in choices})
        self._contexts = sorted({choice.context_length for choice in choices})
        # between two measured batches, or contexts, the rule's answer does not change
        questions = product(self._batches, [*self._contexts, None], self._domains, self._temperatures)
        self._choices = {question: self._ask(*question) for question in questions}

    def find(
        self, batch_size: int, context_length: int | None, domain: str | None, temperature: float
    ) -> Choice | None:
        """The choice that covers a question by the rule of `Policy.look_up`; None: nothing does, so decode plainly.

        Raises: InputError: an impossible value.
        """
        check_asked(batch_size, context_length, temperature)
        measured = match_temperature(self._temperatures, temperature)
        batch = bisect_left(self._batches, batch_size)
        context = 0 if context_length is None else bisect_left(self._contexts, context_length)
        if measured is None or batch == len(self._batches) or context == len(self._contexts):
            return None
        shown = None if context_length is None else self._contexts[context]
        source = domain if domain in self._domains else MIXED
        return self._choices[self._batches[batch], shown, source, measured]

    def _ask(self, batch_size: int, context_length: int | None, domain: str, temperature: float) -> Choice | None:
        answer = self._policy.look_up(
            batch_size=batch_size, context_length=context_length, domain=domain, temperature=temperature
        )
        return answer.choice if answer.matched else None

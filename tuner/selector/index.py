"""The policy's answers to every query, computed beforehand: a look-up takes a microsecond."""

from bisect import bisect_left
from itertools import product

from tuner.policy.policy import Policy
from tuner.policy.query import MIXED, OperatingPoint, check_query, match_temperature


class PolicyIndex:
    """Answers by the rule of `Policy.look_up`. Immutable, so threads may share it."""

    def __init__(self, policy: Policy) -> None:
        choices = policy.choices
        self._temperatures = sorted({choice.temperature for choice in choices})
        self._domains = frozenset(choice.domain for choice in choices)
        self._batch_sizes = sorted({choice.batch_size for choice in choices})
        self._contexts = sorted({choice.context_length for choice in choices})
        # between two measured batches, or contexts, the answer does not change
        self._answers: dict[tuple[int, int | None, str, float], OperatingPoint | None] = {}
        for query in product(self._batch_sizes, [*self._contexts, None], self._domains, self._temperatures):
            batch_size, context_length, domain, temperature = query
            answer = policy.look_up(
                batch_size=batch_size, context_length=context_length, domain=domain, temperature=temperature
            )
            self._answers[query] = answer.choice.point if answer.matched else None

    def find(
        self, batch_size: int, context_length: int | None, domain: str | None, temperature: float
    ) -> OperatingPoint | None:
        """The measured point that covers a query; None: nothing does, so decode plainly. Raises InputError."""
        check_query(batch_size, context_length, temperature)
        measured = match_temperature(self._temperatures, temperature)
        batch = bisect_left(self._batch_sizes, batch_size)
        context = 0 if context_length is None else bisect_left(self._contexts, context_length)
        if measured is None or batch == len(self._batch_sizes) or context == len(self._contexts):
            return None
        covering = None if context_length is None else self._contexts[context]
        source = domain if domain in self._domains else MIXED
        return self._answers[self._batch_sizes[batch], covering, source, measured]

"""A made-up serving engine: the fake one, timed by whole rounds, with a draft that is only run."""

from profiles.engines.base import EngineCapabilities
from profiles.records.core import Draft, Workload
from profiles.records.evidence import StepTimes
from tests.support.fakes import DRAFT_A, NGRAM, TARGET, FakeEngine, drafting_s, target_step_s

NATIVE = Draft(kind="native", method="ngram-mod,n-match=24")
SERVING = EngineCapabilities(
    name="fake-server",
    times="rounds",
    past_end=True,
    batching="continuous",
    traced_kinds=("model", "ngram"),
    origin="fake-server 1 float32",
)


class FakeServer(FakeEngine):
    """Fits `Engine`: whole rounds take what the fake engine's steps do; the native draft runs as draft-a does."""

    def __init__(self, seed: int = 0, keep: float = 0.7) -> None:
        super().__init__(seed, keep)
        self.drafts = (DRAFT_A, NGRAM, NATIVE)
        self.capabilities = SERVING

    def time_steps(self, workload: Workload, context_length: int, max_length: int) -> dict[str, StepTimes]:
        self._asked("time_steps")
        rng = self._random("rounds", workload.batch_size, context_length, max_length)
        rounds = {
            TARGET.run_digest: {1: target_step_s(1)},
            DRAFT_A.digest: {k + 1: target_step_s(k + 1) + drafting_s(DRAFT_A, k, 2) for k in range(1, max_length + 1)},
            NGRAM.digest: {k + 1: target_step_s(k + 1) + drafting_s(NGRAM, 0, 0) for k in range(max_length + 1)},
        }
        return self._timed(rounds, workload, context_length, lambda round_s: round_s * rng.gauss(1.0, 0.01))

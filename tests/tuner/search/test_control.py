"""The negative control sees a difference between the arms through the outliers of a busy machine."""

import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from profiles.engines.torch.decoder import Generation
from profiles.engines.torch.engine import TorchEngine
from profiles.models import loader
from profiles.records.core import PLAIN, Prompt, Setup, Workload
from profiles.records.errors import InputError
from profiles.records.evidence import Sample
from profiles.stats import median_interval
from tests.support.fakes import NGRAM, sample
from tuner.search.control import objection, threads_used
from tuner.search.pairs import Pair, run_pairs

LOOK_UP = Setup(draft=NGRAM, length=4)
SHORT = Workload(context_length=64, max_new_tokens=4)


def _run(setup: Setup, number: int, ttft_s: float) -> Sample:
    """A run of 64 tokens; every fifth prefill takes twenty times as long."""
    spike = 20.0 if random.Random(f"{setup.name} {number}").random() < 0.2 else 1.0
    return sample(setup, prompt_digest=f"prompt {number}", ttft_s=ttft_s * spike, output_tokens=64)


@pytest.mark.parametrize(("plain_s", "is_fair"), [(0.1, True), (0.187, False), (0.05, False)])
def test_outliers_hide_no_difference(plain_s: float, is_fair: bool) -> None:
    """Half the threads in one arm, on a machine that stops a fifth of the runs."""
    pairs = [Pair(_run(PLAIN, number, plain_s), _run(LOOK_UP, number, 0.1)) for number in range(24)]
    assert (objection(LOOK_UP, pairs, batch_size=1, greedy=True) is None) == is_fair
    assert objection(LOOK_UP, pairs, batch_size=4, greedy=True) is None


@pytest.mark.parametrize("planted", [PLAIN, LOOK_UP, None])
def test_half_the_threads_in_one_arm_are_told_under_load(
    planted: Setup | None, tiny_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the torch engine, beside another busy program: a real run says how many threads it had."""
    target = loader.load(str(tiny_folders["llama"]), dtype="float32", device="cpu")
    engine = TorchEngine(target, {NGRAM: None}, "cpu")
    generate = engine._generate

    def with_threads(workload: Workload, prompts: Sequence[Prompt], setup: Setup) -> list[Generation]:
        torch.set_num_threads(1 if setup == planted else 2)
        return generate(workload, prompts, setup)

    monkeypatch.setattr(engine, "_generate", with_threads)
    monkeypatch.setattr("profiles.timing.clock.MAX_REPEATS", 0)
    before = torch.get_num_threads()
    command = [sys.executable, "-c", "while True: pass"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as busy:
        try:
            pairs = [
                pair
                for first in range(8)
                for pair in run_pairs(
                    engine, SHORT, (Prompt(domain="code", token_ids=(first + 5, 9, 7)),), LOOK_UP, "proof 0"
                )
            ]
        finally:
            busy.kill()
            torch.set_num_threads(before)
    reason = objection(LOOK_UP, pairs, batch_size=1, greedy=True)
    assert threads_used(pairs) == {PLAIN: (1, 2), LOOK_UP: (2, 1), None: (2, 2)}[planted]
    assert ("threads" in (reason or "")) == (planted is not None)


def test_the_median_has_an_interval_of_order_statistics() -> None:
    """The 3rd and the 10th of twelve values, which cover 96 %."""
    interval = median_interval([*range(1, 12), 1000])
    assert (interval.low, interval.estimate, interval.high) == (3, 6.5, 10)
    with pytest.raises(InputError, match="at least 6 are needed"):
        median_interval([1.0] * 5)

"""Sampled decoding keeps the target's law: chi-square against exact laws of a table-driven model."""

from dataclasses import replace

import pytest
import torch

import profiles.engines.torch.decoder
from profiles.engines.torch import trace
from profiles.engines.torch.sampling import PURPOSES, KeyedRandom, Proposal, accept_sampled, draw, sampling_probs
from profiles.records.core import Draft, Prompt, Workload
from profiles.records.evidence import TargetTrace
from tests.support.toys import TableModel, near, p_value, run, sequence_law

FALSE_ALARM = 1e-4  # each chi-square test fails a correct engine once in ten thousand different seeds
RUNS = 3000
PROMPT = Prompt(domain="toy", token_ids=(1, 2, 1, 2, 3, 1))
WORKLOAD = Workload(context_length=64, max_new_tokens=4, temperature=0.9)
TARGET = TableModel(seed=1)
DRAFT = near(TARGET, seed=2, distance=1.0)
EXIT = Draft(kind="early_exit", num_layers=1)


def _p_value(draft: object, length: int, workload: Workload) -> float:
    law = sequence_law(TARGET, workload, PROMPT.token_ids[-1])
    outputs = [
        tuple(run(TARGET, draft, length, replace(workload, seed=seed), PROMPT).token_ids) for seed in range(RUNS)
    ]
    return p_value(law, outputs)


@pytest.mark.slow
@pytest.mark.parametrize("draft", [None, DRAFT, "ngram"], ids=["plain", "model", "ngram"])
def test_sampled_outputs_follow_the_exact_law(draft: object) -> None:
    """Sequences of four tokens have the target's law whatever drafts them."""
    assert _p_value(draft, 3, WORKLOAD) > FALSE_ALARM


@pytest.mark.slow
def test_filtered_law_is_kept() -> None:
    """With top-p and top-k the filtered law is kept, and nothing outside it is emitted."""
    assert _p_value(DRAFT, 2, replace(WORKLOAD, top_p=0.8, top_k=4)) > FALSE_ALARM


@pytest.mark.slow
def test_a_planted_bug_fails_the_chi_square(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing from the target's law instead of the residual after a rejection is noticed."""

    def wrong(
        proposal: Proposal, target_probs: torch.Tensor, draws: KeyedRandom, places: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        accepted, token = accept_sampled(proposal, target_probs, draws, places)
        law = target_probs[torch.arange(len(accepted)), accepted]
        unfit = draw(law, draws.at("target", (places + accepted)[:, None])[:, 0])
        return accepted, torch.where(accepted < proposal.counts, unfit, token)

    monkeypatch.setattr(profiles.engines.torch.decoder, "accept_sampled", wrong)
    assert _p_value(DRAFT, 3, WORKLOAD) < FALSE_ALARM


def test_a_temperature_of_next_to_nothing_is_greedy() -> None:
    """As in vLLM: logits divided by it would overflow to NaN."""
    almost = replace(WORKLOAD, temperature=1e-38)
    assert almost.temperature == 0.0
    assert almost.sampling_digest == replace(WORKLOAD, temperature=0.0).sampling_digest
    assert replace(WORKLOAD, temperature=1e-5).temperature == 1e-5


def test_traces_hold_the_distributions_of_a_few_tokens_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long trace has the same acceptance as before, and never a probability of each token for all positions."""
    workload = replace(WORKLOAD, max_new_tokens=40)
    plain = run(TARGET, None, 0, workload, PROMPT)
    output = TargetTrace(
        prompt_digest=PROMPT.digest,
        token_ids=tuple(plain.token_ids),
        target_probs=tuple(plain.target_probs),
        logit_gaps=tuple(plain.logit_gaps),
        ended=plain.ended,
    )
    whole, widths = trace.trace_model(DRAFT, EXIT, workload, PROMPT, output), []

    def watched(logits: torch.Tensor, workload: Workload) -> torch.Tensor:
        widths.append(len(logits))
        return sampling_probs(logits, workload)

    monkeypatch.setattr(trace, "CHUNK", 16)
    monkeypatch.setattr(trace, "sampling_probs", watched)
    assert trace.trace_model(DRAFT, EXIT, workload, PROMPT, output) == whole
    assert widths == [16, 16, 8]


def test_output_law_keeps_the_smallest_nucleus() -> None:
    """Top-p keeps the most likely tokens until their mass reaches it, top-k the k most likely, scaled to one."""
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    workload = Workload(context_length=64, max_new_tokens=2, temperature=1.0, top_p=0.7)
    assert sampling_probs(logits, workload)[0].tolist() == pytest.approx([0.625, 0.375, 0.0, 0.0])
    workload = Workload(context_length=64, max_new_tokens=2, temperature=1.0, top_k=1)
    assert sampling_probs(logits, workload)[0].tolist() == pytest.approx([1.0, 0.0, 0.0, 0.0])


def test_draws_are_keyed_by_seed_and_prompt() -> None:
    """The same seed and prompt draw alike, another seed or prompt differently, and greedy decoding draws nothing."""
    other = Prompt(domain="toy", token_ids=(1, 2, 3))

    def drawn(workload: Workload, prompt: Prompt) -> list[list[float]]:
        draws = KeyedRandom(1, workload, torch.device("cpu"))
        draws.load(0, prompt)
        places = torch.arange(workload.max_new_tokens)[None]
        return [draws.at(purpose, places)[0].tolist() for purpose in PURPOSES]

    first = drawn(WORKLOAD, PROMPT)
    assert first == drawn(WORKLOAD, PROMPT)
    assert first != drawn(replace(WORKLOAD, seed=1), PROMPT)
    assert first != drawn(WORKLOAD, other)
    assert len({tuple(column) for column in first}) == len(PURPOSES)
    assert KeyedRandom(1, replace(WORKLOAD, temperature=0.0), torch.device("cpu")).is_greedy


def test_draw_never_returns_a_token_of_probability_zero() -> None:
    """Even at the very end of the cumulated law."""
    probs = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]] * 2)
    assert draw(probs, torch.tensor([0.0, 1.0 - 1e-16], dtype=torch.float64)).tolist() == [1, 3]

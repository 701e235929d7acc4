"""The generic server engine over llama.cpp's own server (package xllamacpp) with the models that ship."""

import shlex
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest

from profiles.engines.llamacpp.flags import args_for
from profiles.engines.openai.engine import ServerEngine
from profiles.engines.openai.launch import Launch
from profiles.engines.rules import gguf_path
from profiles.engines.serving import base
from profiles.models import loader
from profiles.prompts import read, tokenize
from profiles.records.core import PLAIN, Draft, Prompt, Setup, Workload
from profiles.records.errors import EngineError

TARGET = "builtin:target"
WORKLOAD = Workload(context_length=128, max_new_tokens=32)
POOL = Setup(draft=Draft(kind="native", method="ngram-mod ,n-match=4"), length=4)
NGRAM = Setup(draft=Draft(kind="ngram", max_match=3, min_match=3), length=4)
UNKNOWN = Setup(draft=Draft(kind="native", method="no-such-method"), length=1)


@pytest.fixture(scope="module")
def described() -> loader.DescribedModel:
    return loader.describe(TARGET, dtype="float32")


@pytest.fixture(scope="module")
def engine(described: loader.DescribedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerEngine]:
    words = [sys.executable, "-m", "profiles.engines.llamacpp.xllamacpp_server", "-m", str(gguf_path(TARGET))]
    options = "--host {host} --port {port} -c 1024 -np 4 -t 1 -tb 1 --metrics -fa off {speculative}"
    launch = Launch(
        kind="llamacpp",
        log_folder=tmp_path_factory.mktemp("logs"),
        template=f"{shlex.join(words)} {options}",
        flags_of=lambda setup: ["--no-such-flag"] if setup == UNKNOWN else args_for(setup),
    )
    drafts = tuple(setup.draft for setup in (NGRAM, POOL, UNKNOWN) if setup.draft is not None)
    with ServerEngine(described.record, drafts, launch, "cpu") as one:
        yield one


@pytest.fixture(scope="module")
def code(described: loader.DescribedModel) -> tuple[Prompt, ...]:
    found, _ = tokenize(read("builtin:code")[:4], described.tokenizer, 90)
    return tuple(found)


def test_the_same_text_with_a_draft_and_in_a_batch(engine: ServerEngine, code: tuple[Prompt, ...]) -> None:
    """Greedy outputs are equal, and the rounds account for every token, alone and four at a time."""
    alone = engine.run_together(WORKLOAD, code, (PLAIN, NGRAM), "race 0")
    together = engine.run_together(replace(WORKLOAD, batch_size=4), code, (PLAIN, NGRAM), "race 0")
    assert {one.output_tokens for one in alone} == {32}
    outputs = [one.output_digest for one in alone[:4]]
    assert all([one.output_digest for one in queue] == outputs for queue in (alone[4:], together[:4], together[4:]))
    for drafted, batched in zip(alone[4:], together[4:], strict=True):
        assert sum((accepted + 1) * count for (_, accepted), count in drafted.rounds.items()) == 31
        assert drafted.rounds == batched.rounds
    proposed = sum((Counter(dict(one.rounds)) for one in alone[4:]), Counter())
    assert any(length for length, _ in proposed)


def test_a_pool_is_emptied_before_every_try(
    engine: ServerEngine, code: tuple[Prompt, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A queue that is run again because others disturbed it meets a new server too."""
    again = []
    monkeypatch.setattr(base, "quietest", lambda measure, _: (again.append(measure()) or measure(), False))
    starts = engine.num_starts
    samples = engine.run_together(WORKLOAD, code[:2], (POOL,), "race 0")
    assert engine.num_starts == starts + 2
    [(runs, _)] = again
    assert [dict(run.rounds) for run in runs] == [dict(sample.rounds) for sample in samples]


def test_a_draft_may_sample(engine: ServerEngine, code: tuple[Prompt, ...]) -> None:
    """llama.cpp tells no log-probabilities while it drafts, and is not asked for them."""
    sampled = replace(WORKLOAD, temperature=0.8, top_p=0.9, seed=3)
    assert len(engine.run_together(sampled, code[:1], (NGRAM,), "race 0")) == 1


def test_a_trace(engine: ServerEngine, code: tuple[Prompt, ...]) -> None:
    """A greedy token is the most probable one: its gap is not below 0, and its probability no more than 1."""
    trace = engine.trace_target(WORKLOAD, code[0])
    assert len(trace.token_ids) == 32
    assert all(0.0 < one <= 1.0 for one in trace.target_probs)
    assert min(trace.logit_gaps) > 0.0


def test_a_flag_that_it_does_not_know(engine: ServerEngine, code: tuple[Prompt, ...]) -> None:
    """llama.cpp's own refusal is the error's line, and the plain server goes on."""
    with pytest.raises(EngineError, match=r"xllamacpp_server ended with exit code .*invalid argument: --no-such-flag"):
        engine.run_together(WORKLOAD, code[:1], (UNKNOWN,), "race 0")
    assert engine.run_together(WORKLOAD, code[:1], (PLAIN,), "race 1")

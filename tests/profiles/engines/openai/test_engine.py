"""The generic server engine, against a server without a model that counts as vLLM does."""

import json
import shlex
import statistics
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from profiles.engines.base import Engine
from profiles.engines.llamacpp import responses
from profiles.engines.llamacpp.responses import SERVER as LLAMA_CPP
from profiles.engines.openai.engine import ServerEngine
from profiles.engines.openai.launch import SERVER_KINDS, Launch
from profiles.engines.serving.completion import read_completion
from profiles.engines.serving.http_load import Answer
from profiles.records.core import PLAIN, Draft, Prompt, Setup, Workload, digest_of
from profiles.records.errors import EngineError, InputError
from tests.profiles.engines.serving.test_process import expected
from tests.support.fake_server import VERSION, accepted_at
from tests.support.fakes import TARGET

TEMPLATE = (
    f"FAKE=1 {shlex.quote(sys.executable)} tests/support/fake_server.py --port {{port}} --host {{host}} {{speculative}}"
)
NGRAM = Draft(kind="ngram", max_match=3, min_match=1)
SALTED = ("vllm", "sglang")
WORKLOAD = Workload(context_length=64, max_new_tokens=16)
PROMPTS = tuple(Prompt(domain="a", token_ids=(1, 2, first)) for first in range(8))
DRAFTED = Setup(draft=NGRAM, length=3)


def flags_of(setup: Setup) -> list[str]:
    return ["--speculative", str(setup.length)]


def engine_at(folder: Path, more: str = "", **options: Any) -> ServerEngine:
    options = {"flags_of": flags_of, **options}
    launch = Launch(kind="vllm", log_folder=folder, template=f"{TEMPLATE} {more}", **options)
    return ServerEngine(TARGET, (NGRAM,), launch, "cpu")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerEngine]:
    with engine_at(tmp_path_factory.mktemp("logs")) as one:
        yield one


def expected_rounds(count: int, length: int) -> Counter[tuple[int, int]]:
    rounds: Counter[tuple[int, int]] = Counter()
    place = 1
    while place < count:
        kept = accepted_at(place, length)
        rounds[(length, kept)] += 1
        place += kept + 1
    return rounds


@pytest.mark.parametrize("batch_size", [1, 4])
def test_samples(engine: ServerEngine, batch_size: int) -> None:
    """A sample per setup and prompt, in order; equal outputs; rounds as the server recorded them, at any batch size."""
    workload = replace(WORKLOAD, batch_size=batch_size)
    samples = engine.run_together(workload, PROMPTS, (PLAIN, DRAFTED, PLAIN), "race 0")
    assert [sample.setup_digest for sample in samples[::8]] == [PLAIN.digest, DRAFTED.digest, PLAIN.digest]
    for number, sample in enumerate(samples):
        prompt = PROMPTS[number % 8]
        assert sample.prompt_digest == prompt.digest
        assert sample.output_digest == digest_of(expected(prompt.token_ids[-1], 16))
        assert dict(sample.rounds) == (expected_rounds(16, 3) if 8 <= number < 16 else {(0, 0): 15})
        assert sample.ttft_s > 0.0
        assert sample.decode_s > 0.0
        assert (sample.refills > 0) <= (batch_size > 1)
    assert sum(sample.refills for sample in samples) > 0 or batch_size == 1


def test_two_servers_serve_setups_in_turn(engine: ServerEngine) -> None:
    """Plain decoding and a draft stay up side by side; a third setup stops the one not used the longest."""
    engine.run_together(WORKLOAD, PROMPTS[:1], (PLAIN, DRAFTED), "race 0")
    before = engine.num_starts
    engine.run_together(WORKLOAD, PROMPTS[:1], (PLAIN, DRAFTED, PLAIN, DRAFTED), "race 1")
    assert engine.num_starts == before
    engine.run_together(WORKLOAD, PROMPTS[:1], (PLAIN, replace(DRAFTED, length=2)), "race 1")
    assert engine.num_starts == before + 1


def test_a_server_without_records(tmp_path: Path) -> None:
    """A run then has times and no rounds; of plain decoding the rounds follow from the output."""
    with engine_at(tmp_path, "--no-records") as engine:
        plain, drafted = engine.run_together(WORKLOAD, PROMPTS[:1], (PLAIN, DRAFTED), "race 0")
    assert (dict(plain.rounds), dict(drafted.rounds)) == ({(0, 0): 15}, {})
    assert plain.output_digest == drafted.output_digest


def test_a_trace_of_the_target(engine: Engine) -> None:
    """Tokens, probabilities and gaps as the server states them; an end token ends it and is kept."""
    trace = engine.trace_target(WORKLOAD, PROMPTS[0])
    assert list(trace.token_ids) == expected(PROMPTS[0].token_ids[-1], 16)
    assert trace.target_probs == pytest.approx([0.6065] * 16, abs=1e-3)
    assert trace.logit_gaps == (0.75,) * 16
    assert not trace.ended
    ended = engine.trace_target(replace(WORKLOAD, end_token_ids=(trace.token_ids[4],)), PROMPTS[0])
    assert (ended.token_ids, ended.ended) == (trace.token_ids[:5], True)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_plain_rounds(tmp_path: Path, batch_size: int) -> None:
    """A mean of each request, near the length of the server's steps as far as the machine is free."""
    with engine_at(tmp_path, "--step-s 0.004") as engine:
        times = engine.time_steps(replace(WORKLOAD, batch_size=batch_size), 40, 4)
    assert set(times) == {TARGET.run_digest}
    [(width, samples_s)] = times[TARGET.run_digest].samples_s.items()
    assert (width, len(samples_s)) == (1, 7 * batch_size)
    assert 0.002 < statistics.median(samples_s) < 0.05


@pytest.mark.parametrize("skewed", [False, True])
def test_sampled_text_must_be_the_target_s(tmp_path: Path, skewed: bool) -> None:
    """A draft whose sampled text is less likely to the target than plain text is refused, by one prompt too."""
    with engine_at(tmp_path, "--skewed" if skewed else "") as engine:
        assert engine.run_together(WORKLOAD, PROMPTS[:1], (DRAFTED,), "race 0")
        workload = replace(WORKLOAD, temperature=0.8)
        if not skewed:
            assert len(engine.run_together(workload, PROMPTS[:1], (DRAFTED, PLAIN), "race 0")) == 2
        else:
            with pytest.raises(EngineError, match=r"writes another text than plain decoding.* over 16 texts"):
                engine.run_together(workload, PROMPTS[:1], (DRAFTED, PLAIN), "race 0")


def test_an_output_that_ends_early(tmp_path: Path) -> None:
    """Where no token is an end an output has all the tokens that were asked for."""
    with (
        engine_at(tmp_path, "--most 9") as engine,
        pytest.raises(
            EngineError, match=r"server with plain ended after 9 of \d+ tokens, at token \d+; no token is an"
        ),
    ):
        engine.run_together(WORKLOAD, PROMPTS[:1], (PLAIN,), "race 0")


@pytest.mark.parametrize(("device", "most"), [("cpu", 2), ("cuda:0", 1)])
def test_a_gpu_holds_one_server(tmp_path: Path, device: str, most: int) -> None:
    """A server takes all of a GPU's memory, so another is stopped first; two take turns on a processor."""
    launch = Launch(kind="vllm", log_folder=tmp_path, template=TEMPLATE, flags_of=flags_of)
    with ServerEngine(TARGET, (NGRAM,), launch, device) as engine:
        engine.run_together(WORKLOAD, PROMPTS[:1], (DRAFTED, PLAIN, DRAFTED), "race 0")
        assert engine.num_starts == 4 - most


def test_what_is_computed_follows_from_the_template(tmp_path: Path) -> None:
    """Traces of a server started otherwise are another origin's."""
    origins = set()
    for more in ("", "--step-s 0.002"):
        with engine_at(tmp_path, more) as engine:
            origins.add(engine.capabilities.origin)
    assert len(origins) == 2
    assert all(origin.startswith(f"server vllm {VERSION} float32 ") for origin in origins)


def test_requests() -> None:
    """Nothing comes from a prefix cache, and llama.cpp samples as its own adapter has it."""
    sampled = replace(WORKLOAD, temperature=0.7, top_k=5, top_p=0.9)
    for kind in SALTED:
        salts = {SERVER_KINDS[kind].body_of(WORKLOAD, PROMPTS[0])["cache_salt"] for _ in range(3)}
        assert len(salts) == 3
    own = LLAMA_CPP.body_of(sampled, PROMPTS[0])
    assert own == responses.body_of(sampled, PROMPTS[0].token_ids)
    assert own["samplers"] == ["temperature", "top_k", "top_p"]


def test_what_it_says_of_itself_and_refuses(engine: ServerEngine) -> None:
    """The server's version and how it was started are in the environment; drafts are run, not traced.

    A draft that is not its own, and prompts that leave no room, are refused.
    """
    assert (engine.environment.engine, engine.environment.engine_version) == ("vllm", VERSION)
    assert "{port}" in json.loads(engine.environment.engine_options or "")["served by"]
    assert engine.capabilities.traced_kinds == ()
    with pytest.raises(InputError, match="it is run instead"):
        engine.trace_draft(WORKLOAD, PROMPTS[0], engine.trace_target(WORKLOAD, PROMPTS[0]), NGRAM, 4)
    with pytest.raises(InputError, match="is not one of this engine's"):
        engine.run_together(WORKLOAD, PROMPTS, (Setup(draft=replace(NGRAM, max_match=9), length=1),), "race 0")
    with pytest.raises(InputError, match="allowed are 64 together"):
        engine.run_together(WORKLOAD, (Prompt(domain="a", token_ids=(1,) * 60),), (PLAIN,), "race 0")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("serve --port {port}", "{speculative} is needed"),
        ("serve {speculative}", "{port} is needed"),
        ("serve 'it", "No closing quotation"),
    ],
)
def test_templates_that_are_none(tmp_path: Path, template: str, said: str) -> None:
    """A template must be a command line with a place for the port and, with drafts, for their flags."""
    with pytest.raises(InputError, match=said):
        Launch(kind="vllm", log_folder=tmp_path, template=template, flags_of=flags_of).command(DRAFTED)


def test_a_template_filled_in(tmp_path: Path) -> None:
    """Variables go before the command, flags where they are asked for, and braces of JSON stay as they are."""
    launch = Launch(
        kind="vllm",
        log_folder=tmp_path,
        template="A=1 B='x y' serve 'my model' {speculative} --port {port}",
        flags_of=lambda setup: ["--config", '{"k": 1}'],
    )
    flags = ["--config", '{"k": 1}']
    assert launch.command(DRAFTED) == ({"A": "1", "B": "x y"}, ["serve", "my model", *flags, "--port", "{port}"])
    assert launch.command(PLAIN)[1] == ["serve", "my model", "--port", "{port}"]


def answered(*events: dict[str, Any]) -> Answer:
    return Answer(started_s=0.0, chunks=tuple((float(at), event) for at, event in enumerate(events, start=1)))


def test_rounds_of_sglang() -> None:
    """Its record has a histogram of accepted tokens over rounds that drafted equally many."""
    record = {"spec_num_proposed_drafts": 9, "spec_verify_ct": 3, "spec_correct_drafts_histogram": [1, 0, 1, 1]}
    events = [{"choices": [{"token_ids": [1] * size}]} for size in (1, 1, 3, 4)]
    answer = answered(*events, {"sglext": {"spec_tokens_details": record}})
    completion = SERVER_KINDS["sglang"].read(answer, "", {})
    assert completion.rounds == {(3, 0): 1, (3, 2): 1, (3, 3): 1}


@pytest.mark.parametrize(
    ("events", "said"),
    [
        ([{"choices": [{"token_ids": [1, 2]}]}, {"usage": {"completion_tokens": 3}}], "counted 3 tokens and gave"),
        (
            [{"choices": [{"text": "t1 "}]}, {"usage": {"completion_tokens": 1}}],
            "gave the ids of 0",
        ),
        ([{"choices": [{"token_ids": []}]}], "counted None tokens"),
        ([{"choices": ["x"]}], "another shape"),
        ([{"choices": [{"token_ids": 7}]}], "another shape"),
    ],
)
def test_answers_that_are_none(events: list[dict[str, Any]], said: str) -> None:
    """Tokens that cannot be told for sure are an error, not a guess."""
    with pytest.raises(EngineError, match=said):
        read_completion(answered(*events), lambda _: None)

"""The scheduler inside a real vLLM on the processor: what it speaks, which lengths it takes, and what it leaves."""

import ast
import json
import shlex
from dataclasses import replace
from functools import cache
from pathlib import Path

import httpx2
import psutil
import pytest
from packaging.version import Version

from profiles.acceptance.ngram import trace_lookup
from profiles.builtin import BUILTIN_FOLDER
from profiles.engines.serving.process import free_port, start_server
from profiles.engines.torch.engine import TorchEngine
from profiles.engines.vllm.flags import LOOKUP_KEY, STEERED
from profiles.hardware import fingerprint
from profiles.models import loader
from profiles.prompts import read, tokenize
from profiles.records.core import Draft, Prompt, Setup, Workload
from profiles.records.errors import EngineError
from profiles.records.evidence import AcceptanceTrace
from tests.lanes.places import LANES, ROOT, RUNNING, TRITON
from tests.support.cli import call
from tests.support.policies import acceptance, choice, policy, round_times
from tests.support.vllm_client import QUIET, VllmClient, speculative
from tuner.export.vllm import SCHEDULER
from tuner.policy.policy import Policy, write
from tuner.policy.prior import Prior

pytestmark = pytest.mark.vllm
runs = pytest.mark.skipif(not RUNNING.is_whole, reason="no lane: make test-vllm")
interpreted = pytest.mark.skipif(not TRITON.is_whole, reason="no lane: make test-vllm")
NEW, DRAFTED, LOOKUP = 20, 3, 8


@cache
def prompts() -> list[list[int]]:
    target = loader.load("builtin:target", dtype="float32", device="cpu")
    tokenized, _ = tokenize(read("builtin:code")[:2] + read("builtin:prose")[:2], target.tokenizer, 120)
    return [list(prompt.token_ids) for prompt in tokenized]


@cache
def draft() -> Draft:
    return Draft(kind="model", model=loader.describe("builtin:draft-general", dtype="float32").record)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    with VllmClient(tmp_path_factory.mktemp("plain"), {}) as vllm:
        return list(vllm.decode(prompts(), 3, NEW)["tokens"])


@pytest.mark.parametrize(
    ("v2", "asynchronous"),
    [
        pytest.param(False, False, id="v1", marks=runs),
        pytest.param(True, False, id="v2", marks=interpreted),
        pytest.param(True, True, id="v2-async", marks=interpreted),
    ],
)
def test_any_lengths_speak_plain_text(v2: bool, asynchronous: bool, plain: list[list[int]], tmp_path: Path) -> None:
    """Another length for every request in every step; each verifies what it was told, or less at the end."""
    options = {"cycles": True, "scheduler_cls": SCHEDULER, "speculative_config": speculative(6, scheduled=True)}
    path = tmp_path / "steps.jsonl"
    variables = {"DRAFTPICK_STEPS": str(path)}
    with VllmClient(tmp_path, options, v2=v2, asynchronous=asynchronous, variables=variables) as vllm:
        answer = vllm.decode(prompts(), 3, NEW)
    assert answer["tokens"] == plain
    assert answer["scheduler"] == ("AsyncDraftpickScheduler" if asynchronous else "DraftpickScheduler")
    steps = [json.loads(line)["rows"] for line in path.read_text().splitlines()]
    rows = [row for step in steps for row in step]
    assert {length for length, _, _ in rows} == {0, 1, 2, 3, 6}
    assert all(proposed <= length and emitted <= proposed + 1 for length, proposed, emitted in rows)
    assert sum(length == proposed for length, proposed, _ in rows) > 0.8 * len(rows)
    assert any(len({length for length, _, _ in step}) > 1 for step in steps)
    assert sum(emitted for _, _, emitted in rows) >= len(plain) * (NEW - 1)


@cache
def forecast() -> list[list[tuple[int, int]]]:
    """By prompt the rounds (proposed, emitted) of a look-up before the draft model, from our own engine's traces."""
    target, small = (
        loader.load(f"builtin:{name}", dtype="float32", device="cpu") for name in ("target", "draft-general")
    )
    engine = TorchEngine(target, {draft(): small.model}, "cpu")
    longer = Workload(context_length=256, max_new_tokens=NEW + LOOKUP)  # vLLM counts what it accepts past the end
    rounds = []
    for token_ids in prompts():
        prompt = Prompt(token_ids=tuple(token_ids), domain="code")
        trace = engine.trace_target(longer, prompt)
        model = engine.trace_draft(longer, prompt, trace, draft(), DRAFTED)
        lookup = trace_lookup(Draft(kind="ngram", max_match=4, min_match=2), prompt, trace, LOOKUP)
        assert isinstance(model, AcceptanceTrace)
        start, of_prompt = 1, []
        while start < NEW:
            if proposed := lookup.proposed[start]:
                accepted = lookup.accepted[start]
            else:
                proposed = DRAFTED
                probs = model.accept_probs[start : start + DRAFTED]
                accepted = next((index for index, prob in enumerate(probs) if prob == 0.0), len(probs))
            of_prompt.append((proposed, accepted + 1))
            start += accepted + 1
        rounds.append(of_prompt)
    return rounds


@pytest.mark.parametrize(
    "v2", [pytest.param(False, id="v1", marks=runs), pytest.param(True, id="v2", marks=interpreted)]
)
def test_a_look_up_goes_before_the_drafter(v2: bool, plain: list[list[int]], tmp_path: Path) -> None:
    """Outputs are those of plain decoding, and every prompt's rounds those that two traces tell."""
    options = {
        "scheduler_cls": "tests.support.vllm_driver.LookupScheduler",
        "worker_cls": "profiles.engines.vllm.lookup_scheduler.LookupWorker",
        "additional_config": {LOOKUP_KEY: [4, 2, DRAFTED]},
        "speculative_config": speculative(LOOKUP, scheduled=True),
    }
    path = tmp_path / "steps.jsonl"
    with VllmClient(tmp_path, options, v2=v2, variables={"DRAFTPICK_STEPS": str(path)}) as vllm:
        assert vllm.decode(prompts(), 3, NEW)["tokens"] == plain
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    by_prompt = [[tuple(row[1:]) for row in rows if row[0].partition("-")[0] == str(n)] for n in range(len(plain))]
    assert by_prompt == forecast()
    assert any(proposed > DRAFTED for rounds in by_prompt for proposed, _ in rounds)


@pytest.mark.parametrize(
    ("v2", "scheduler", "message"),
    [
        pytest.param(False, SCHEDULER, "DRAFTPICK_POLICY is not set: it names the policy file", id="v1", marks=runs),
        pytest.param(
            True,
            "profiles.engines.vllm.lookup_scheduler.LookupScheduler",
            "Model Runner V2 needs --worker-cls profiles.engines.vllm.lookup_scheduler.LookupWorker",
            id="v2",
            marks=interpreted,
        ),
    ],
)
def test_what_is_missing_ends_the_start(v2: bool, scheduler: str, message: str, tmp_path: Path) -> None:
    """In one line."""
    options = {"scheduler_cls": scheduler, "speculative_config": speculative(LOOKUP, scheduled=True)}
    options["additional_config"] = {LOOKUP_KEY: [4, 2, DRAFTED]}
    with VllmClient(tmp_path, options, v2=v2) as vllm, pytest.raises(EngineError, match=message):
        vllm.decode(prompts(), 3, NEW)


def policy_of(longest: int) -> Policy:
    """The draft pays at every length up to `longest`."""
    prior = Prior(
        drafts=(draft(),),
        lengths=tuple(range(1, longest + 1)),
        acceptance=(acceptance(0, 0.9, longest=longest),),
        round_times=(round_times(None, 0.0), round_times(0, 0.0005, longest=longest)),
    )
    environment = replace(fingerprint.fingerprint("cpu"), engine="vllm", engine_version=RUNNING.version)
    row = choice(Setup(draft=draft(), length=longest))
    return replace(policy(row), prior=prior, environment=environment)


@runs
def test_a_server_follows_its_policy(plain: list[list[int]], tmp_path: Path) -> None:
    """The emitted command: a policy replaced while it serves, gauges, a request's domain, and nothing after a kill."""
    path, steps, port = tmp_path / "policy.json", tmp_path / "steps.jsonl", free_port()
    write(path, policy_of(4))
    form = ("--format", "vllm", "--engine-version", RUNNING.version, "--adaptive")
    emitted = call(tmp_path, "lookup", "--policy", path, *form)
    command = [
        *(str(RUNNING.python), "-m", "vllm.entrypoints.cli.main", "serve", str(BUILTIN_FOLDER / "target")),
        *("--port", "{port}", "--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "8", "--enforce-eager"),
        *("--served-model-name", "target", "--generation-config", "vllm", *shlex.split(emitted.stdout)),
    ]
    variables = {"DRAFTPICK_POLICY": str(path), "DRAFTPICK_STEPS": str(steps), "VLLM_CPU_KVCACHE_SPACE": "1"}
    variables |= QUIET | {"PYTHONPATH": str(ROOT), "DRAFTPICK_METRICS": f"127.0.0.1:{port}"}
    body = {"model": "target", "temperature": 0.0, "max_tokens": NEW, "ignore_eos": True, "return_token_ids": True}

    def complete() -> None:
        answer = httpx2.post(
            f"{server.url}/v1/completions",
            json=body | {"prompt": prompts()[0], "vllm_xargs": {"draftpick_domain": "code"}},
            timeout=60.0,
        )
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["token_ids"] == plain[0]

    def lengths() -> set[int]:
        return {row[0] for line in steps.read_text().splitlines() for row in json.loads(line)["rows"]}

    with start_server(command, tmp_path / "log", 180.0, environment=variables) as server:
        complete()
        assert max(lengths()) > 1
        write(path, policy_of(1))
        steps.write_text("")
        complete()
        assert lengths() <= {0, 1}
        metrics = httpx2.get(f"http://127.0.0.1:{port}/metrics", timeout=10.0).text
        for gauge in ("refused_reports", "stale_policy"):
            assert f'draftpick_{gauge}{{engine="0"}} 0.0' in metrics
        pids = server.pids
        [api_server] = [pid for pid in pids if "serve" in psutil.Process(pid).cmdline()][-1:]
        psutil.Process(api_server).kill()
        assert server.wait(30.0)
        assert not [pid for pid in pids if psutil.pid_exists(pid)]


HOOKS = {  # of vLLM's Scheduler: the arguments that DraftpickScheduler passes on or reads
    "schedule": ["self", "throttle_prefills"],
    "_update_after_schedule": ["self", "scheduler_output"],
    "update_from_output": ["self", "scheduler_output", "model_runner_output"],
    "update_draft_token_ids": ["self", "draft_token_ids"],
    "shutdown": ["self"],
}


@pytest.mark.parametrize("version", ["0.24.0", "0.32.0", "0.33.0"])
def test_hooks_are_in_the_source(version: str) -> None:
    """Every version that is let through has them, and hands over how many tokens are drafted."""
    lane = next(lane for lane in LANES if (lane.form, lane.version) == ("vllm", version))
    folder = lane.folder / "vllm/v1/core/sched"
    if not folder.is_dir():
        pytest.skip(f"no lane: python -m tests.lanes.install vllm={version}")
    tree = ast.parse((folder / "scheduler.py").read_text(encoding="utf-8"))
    [scheduler] = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Scheduler"]
    functions = {node.name: node for node in scheduler.body if isinstance(node, ast.FunctionDef)}
    assert {name: [argument.arg for argument in functions[name].args.args] for name in HOOKS} == HOOKS
    assert "has_unfinished_requests" in (folder / "interface.py").read_text(encoding="utf-8")
    assert "scheduler_output.num_spec_tokens_to_schedule" in (folder / "async_scheduler.py").read_text(encoding="utf-8")
    first, last = STEERED
    assert Version(first) <= Version(version) <= Version(last)

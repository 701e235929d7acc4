"""A tuning run adds to what earlier runs decided: only what it decided anew is replaced."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from profiles.records.core import PLAIN, Setup, Workload
from profiles.records.draft_spec import RefusedDraft
from store.database import Location
from store.evidence_store import EvidenceStore
from tests import ROOT
from tests.support.fakes import DRAFT_A, GREEDY, MACHINE, FakeEngine, prompts
from tests.support.policies import choice, measured, policy, save_policy
from tests.support.servers import ask
from tuner.cli.messages import run_summary
from tuner.pipeline.pipeline import Watch
from tuner.pipeline.trial import Options
from tuner.policy import policy as policies
from tuner.run import FinishedRun, TuningSession, tune
from tuner.search.limits import Limits

PROMPTS = prompts(40)
HOT = Workload(context_length=256, max_new_tokens=64, temperature=0.8)
LONG = Workload(context_length=512, max_new_tokens=64)


@pytest.fixture
def session(evidence_store: EvidenceStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TuningSession:
    monkeypatch.setenv("DRAFTPICK_STORE", str(tmp_path / "home"))  # policies of a server's store
    return TuningSession.of(evidence_store)


def run(
    session: TuningSession,
    workload: Workload,
    lengths: tuple[int, ...] = (2,),
    engine: FakeEngine | None = None,
    out_of_time: bool = False,
) -> FinishedRun:
    """One anchor, on an engine that drafting wins on."""
    engine = engine or FakeEngine(keep=0.95)
    engine.drafts = (DRAFT_A,)
    return tune(
        engine, [(workload, PROMPTS)], session, Options(lengths=lengths), Watch(out_of_time=lambda: out_of_time)
    )


def chosen(policy: policies.Policy) -> list[tuple[float, int, int]]:
    """Temperature, context and speculation length of every choice."""
    return [(one.temperature, one.context_length, one.setup.length) for one in policy.choices]


def test_a_second_run_adds_its_anchors(session: TuningSession) -> None:
    """Tuned at temperature 0, then 0.8, then at a longer context, the policy answers for all, the newest first."""
    run(session, GREEDY)
    run(session, HOT)
    policy = policies.read(run(session, LONG).policy_path)
    assert chosen(policy) == [(0.0, 512, 2), (0.8, 256, 2), (0.0, 256, 2)]
    assert all(choice.proven for choice in policy.choices)
    for temperature in (0.0, 0.8):
        assert policy.look_up(temperature=temperature, context_length=200).matched
    assert session.evidence_store.latest_policy() == policies.to_json(policy)


def test_a_run_replaces_its_own_anchor(session: TuningSession) -> None:
    """Tuned again with other lengths, an anchor has the new choice and the others stay."""
    run(session, GREEDY)
    run(session, HOT)
    assert chosen(run(session, GREEDY, (4,)).policy) == [(0.0, 256, 4), (0.8, 256, 2)]


def test_one_filter_per_temperature(session: TuningSession) -> None:
    """A question does not name top-p and top-k, so a run with others replaces every choice of its temperature."""
    run(session, GREEDY)
    run(session, HOT)
    narrow = Workload(context_length=512, max_new_tokens=64, temperature=0.8, top_p=0.9)
    policy = run(session, narrow).policy
    assert chosen(policy) == [(0.8, 512, 2), (0.0, 256, 2)]
    assert policy.choices[0].top_p == 0.9


def test_machines_share_a_folder(session: TuningSession) -> None:
    """Every machine has a policy file of its own, and adds only to its own choices."""
    other = FakeEngine(keep=0.95)
    other.environment = replace(MACHINE, device="other cpu")
    here, there = run(session, GREEDY), run(session, HOT, engine=other)
    assert here.policy_path != there.policy_path
    assert here.policy_path.name.endswith(f"-{MACHINE.digest[:8]}.json")
    assert chosen(policies.read(there.policy_path)) == [(0.8, 256, 2)]
    assert chosen(run(session, LONG).policy) == [(0.0, 512, 2), (0.0, 256, 2)]


def test_a_run_out_of_time_keeps_what_was_proven(session: TuningSession) -> None:
    """The earlier proven choice of the anchor stays where the budget ended before a new one was."""
    first = run(session, GREEDY).policy
    assert run(session, GREEDY, (4,), out_of_time=True).policy.choices == first.choices
    cut = run(session, HOT, out_of_time=True).policy
    assert chosen(cut) == [(0.8, 256, 0), (0.0, 256, 2)]
    assert "budget ended" in cut.headline.reason


def test_evidence_ids_are_those_in_the_store(session: TuningSession) -> None:
    """Also when old runs were measured again: the policy names the new ones."""
    first = run(session, GREEDY)
    again = run(replace(session, since="2999-01-01T00:00:00+00:00"), GREEDY)
    kept = {
        unit for (unit,) in ask(session.evidence_store, "SELECT digest FROM units JOIN samples ON unit_id = units.id")
    }
    old, new = set(first.policy.headline.evidence), set(again.policy.headline.evidence)
    assert old <= kept
    assert new <= kept
    assert not old & new


def test_an_earlier_choice_is_not_kept_for_new_limits(session: TuningSession) -> None:
    """It was not held to them, and the budget ended before anything else was proven."""
    assert run(session, GREEDY).policy.headline.proven
    engine = FakeEngine(keep=0.95)
    engine.drafts = (DRAFT_A,)
    options = Options(lengths=(2,), limits=Limits(max_memory_gib=1.0))
    late = tune(engine, [(GREEDY, PROMPTS)], session, options, Watch(out_of_time=lambda: True))
    assert not late.policy.headline.proven


def test_holm_goes_over_the_runs_of_a_policy(session: TuningSession) -> None:
    """Two earlier runs proved a batch each, at p = 0.03 and 0.04: together neither passes; at 0.0001 both do."""
    setup = Setup(draft=DRAFT_A, length=2)
    for p_values, proven in (((0.03, 0.04), False), ((1e-4, 2e-4), True)):
        earlier = [
            choice(setup, batch_size=size, measured=replace(measured(setup), p_value=p_value), forecast=None)
            for size, p_value in zip((4, 8), p_values, strict=True)
        ]
        engine = FakeEngine(keep=0.95)
        before = replace(policy(*earlier), target=engine.target, environment=engine.environment)
        save_policy(session.evidence_store, policies.to_json(before), engine.target, engine.environment)
        joined = run(session, GREEDY).policy
        by_batch = {row.batch_size: row for row in joined.choices}
        assert by_batch[1].proven
        assert by_batch[4].proven == by_batch[8].proven == proven
        assert proven or (by_batch[4].setup == PLAIN and "3 operating points" in by_batch[4].reason)


def test_runs_may_share_a_store(location: Location, tmp_path: Path) -> None:
    """Three processes tune on one fresh store at once: none fails, no unit is there twice, each anchor is kept."""
    environment = {**os.environ, "DRAFTPICK_STORE": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER, str(location), temperature],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for temperature in ("0.0", "0.0", "0.8")
    ]
    for one in runs:
        assert one.stdout.readline() == "ready\n"
    for one in runs:
        one.stdin.write("go\n")
        one.stdin.flush()
    assert [one.communicate(timeout=120)[1] for one in runs] == ["", "", ""]
    assert [one.returncode for one in runs] == [0, 0, 0]
    with EvidenceStore.open(location) as evidence_store:
        text = evidence_store.latest_policy()
    assert text is not None
    assert {choice.temperature for choice in policies.from_json(text).choices} == {0.0, 0.8}
    assert ask(location, "SELECT count(*) FROM runs WHERE outcome IS NOT NULL") == [(3,)]
    timed = "FROM samples JOIN units ON units.id = unit_id"
    assert ask(location, f"SELECT digest, position {timed} GROUP BY digest, position HAVING count(*) > 1") == []
    assert ask(location, f"SELECT count(*) {timed}")[0][0] > 0


TOGETHER = """
import sys
from pathlib import Path
from store.evidence_store import EvidenceStore
from store.database import Location
from store.database import is_url
from tuner.run import TuningSession
from tests.tuner import test_run as t
print("ready", flush=True)
input()
workload = t.Workload(context_length=256, max_new_tokens=64, temperature=float(sys.argv[2]))
with EvidenceStore.open(sys.argv[1] if is_url(sys.argv[1]) else Path(sys.argv[1])) as book:
    t.run(TuningSession.of(book), workload, engine=t.FakeEngine(keep=0.95))
"""


def test_a_budget_that_ends_after_a_win_is_no_news(session: TuningSession) -> None:
    """A few queues of the proof may be enough; the summary does not say that it was not proven in time."""
    done: list[str] = []
    watch = Watch(progress=lambda stage, *_: done.append(stage), out_of_time=lambda: done.count("proof mixed") >= 5)
    load = (replace(GREEDY, batch_size=4), PROMPTS)
    finished = tune(FakeEngine(keep=0.9), [load], session, Options(lengths=(1, 2, 3, 4)), watch)
    assert finished.outcome.choices[0].proven
    assert finished.outcome.points[0].stopped is not None
    assert not any("budget ended" in line for line in run_summary(finished))


def test_a_vllm_that_tells_less_of_its_cache_ends_no_run(session: TuningSession) -> None:
    """What a version does not tell is left out of the summary."""
    finished = tune(FakeEngine(keep=0.9), [(GREEDY, PROMPTS)], session, Options(lengths=(1, 2)), Watch())
    cache = {"kv_tokens": 4096, "concurrency": None, "preemptions": None}
    finished = replace(finished, cost=finished.cost | {"kv_cache": {"plain": cache}})
    assert "KV cache, plain: 4096 tokens; preempted 0 times" in run_summary(finished)


def test_setups_left_out_for_one_cause_share_a_line(session: TuningSession) -> None:
    finished = tune(FakeEngine(keep=0.9), [(GREEDY, PROMPTS)], session, Options(lengths=(1, 2)), Watch())
    slower = [RefusedDraft(name=f"a k={k}", reason="end to end", detail="it is slower") for k in (1, 2, 3)]
    missing = RefusedDraft(name="b", reason="ModelError", detail="no such directory")
    finished = replace(finished, left_out=(*slower, missing))
    lines = [line for line in run_summary(finished) if line.startswith("infeasible")]
    assert lines == [
        "infeasible: a k=1 and 2 more (end to end): it is slower",
        "infeasible: b (ModelError): no such directory",
    ]

"""Whole runs of the command line on tiny random models: what they print, keep, reuse and survive."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import pytest
from safetensors.torch import load_file, save_file

from profiles.engines.torch.engine import TorchEngine
from tests import ROOT
from tests.support import tiny
from tests.support.cli import DECIDED, Said, assert_packs, call, database, evidence, small_run, write_prompts
from tests.support.fakes import sql
from tuner.policy import policy as policies
from tuner.search import studies
from tuner.selector.selector import Selector

DRAFTS = ["--draft", "ngram", "--draft", "early-exit:1"]
NUM_PROMPTS = 30
KEYS = {
    "target", "environment", "choice", "speedup", "end_to_end", "plain_tok_per_s", "chosen_tok_per_s", "proven",
    "anchors", "crossover_batch", "cost", "store", "policy",
}  # fmt: skip
NUM_RACED_PROMPTS = 40  # 24 are left to the proof, which is enough for a race on the others
NUM_CHOICE_PROMPTS = 9  # under a third of them; the others are traced for a proof alone
UNITS_BEFORE_CALIBRATION = NUM_CHOICE_PROMPTS * 3 + 1  # a target trace and two drafts' traces a prompt; step times


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """A finished run: its words, its store and what it said."""

    words: list[str]
    store: Path
    said: Said


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", NUM_PROMPTS)


@pytest.fixture(
    scope="module", params=["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "gpt_neox"))]
)
def tuned(
    request: pytest.FixtureRequest,
    tiny_folders: dict[str, Path],
    prompts: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Tuned:
    words = small_run(tiny_folders[request.param], prompts, *DRAFTS)
    store = tmp_path_factory.mktemp("store")
    return Tuned(words=words, store=store, said=call(store, *words))


@pytest.fixture(scope="module")
def won(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    """A run that drafting wins: layers after the first add nothing, so early exits are always right and far cheaper."""
    folder = tiny.write_model(tmp_path_factory.mktemp("deep"), num_layers=10)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")) and ".layers.0." not in name:
            tensor.zero_()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    prompts = write_prompts(folder.parent / "prompts.jsonl", NUM_RACED_PROMPTS)
    words = small_run(folder, prompts, "--draft", "early-exit:1", "--draft", "early-exit:2", "--lengths", "2-4")
    store = tmp_path_factory.mktemp("store")
    said = call(store, *words)
    if said.code == 5:
        pytest.skip(f"this machine was too noisy to prove a win of about 1.5: {said.document['reason']}")
    return Tuned(words=words, store=store, said=said)


class TestARun:
    def test_its_last_line_is_one_document(self, tuned: Tuned) -> None:
        """The run ends well, and a program finds every figure in the last line of stdout."""
        assert tuned.said.code in DECIDED
        document = tuned.said.document
        assert document.keys() >= KEYS
        assert document["choice"].keys() >= {"draft", "length"}
        assert document["speedup"].keys() == {"estimate", "low", "high"}
        assert document["cost"].keys() >= {"measured_seconds", "reused_units", "grid_seconds_estimate"}
        assert document["cost"]["reused_units"] == 0
        assert [anchor["domain"] for anchor in document["anchors"]] == ["mixed"]
        assert document["store"] == str(tuned.store)
        if document["choice"]["draft"] is None:
            assert document["choice"]["length"] == 0
            assert document["speedup"] == {"estimate": 1.0, "low": 1.0, "high": 1.0}
            assert document["proven"] is False

    def test_its_evidence_is_complete(self, tuned: Tuned) -> None:
        """A trace per prompt of the choice, of each draft too, a sweep of three parts, and no failure."""
        rows = evidence(tuned.store)
        traces = [rows[name] for name in ("target_traces", "acceptance_traces", "lookup_traces")]
        assert NUM_CHOICE_PROMPTS <= min(traces) <= max(traces) == rows["target_traces"] <= NUM_PROMPTS
        timed = "SELECT count(DISTINCT sweep_id), count(DISTINCT component_digest) FROM step_times"
        assert sql(database(tuned.store), timed) == [(1, 3)]
        assert rows["infeasible"] == 0
        assert rows["samples"] >= 3 * 6  # prompts, by plain decoding and two lengths of each draft

    def test_the_second_run_measures_nothing(self, tuned: Tuned) -> None:
        """The same command again finds every unit in the store, and says so."""
        before = evidence(tuned.store)
        said = call(tuned.store, *tuned.words)
        cost = said.document["cost"]
        assert said.code in DECIDED
        assert cost["measured_units"] == 0
        assert cost["measured_seconds"] == 0.0
        assert cost["reused_units"] == tuned.said.document["cost"]["measured_units"] > UNITS_BEFORE_CALIBRATION
        assert f"reused {cost['reused_units']} stored units" in said.stdout
        assert said.document["choice"] == tuned.said.document["choice"]
        assert evidence(tuned.store) == before

    def test_it_is_packed_whole(self, tuned: Tuned, tmp_path: Path) -> None:
        assert_packs(tuned.store, tmp_path)

    def test_its_policy_is_applied_by_the_selector(self, tuned: Tuned) -> None:
        """The file named in the document is a policy, and the selector answers from it."""
        policy = policies.read(tuned.said.document["policy"])
        assert Selector(policy).choose().setup == policy.headline.setup
        assert policy.headline.reason == tuned.said.document["reason"]

    def test_its_studies_open_in_optuna(self, tuned: Tuned) -> None:
        """The forecasts are a study of their own database: plain decoding first, then every setup, the best first."""
        study = load_study(tuned.store, "forecasts")
        assert len(study.trials) == 5
        assert study.trials[0].params == {"draft": "plain", "k": 0}
        assert study.trials[0].user_attrs["speedup"] == 1.0
        assert len({trial.user_attrs["setup"] for trial in study.trials[1:]}) == 4
        assert {trial.params["draft"].split(":")[0] for trial in study.trials[1:]} == {"ngram", "early-exit"}
        scores = [trial.value for trial in study.trials[1:]]
        assert scores == sorted(scores, reverse=True)

    def test_show_tells_what_is_known(self, tuned: Tuned) -> None:
        """Rows per kind of evidence, then the policy."""
        said = call(tuned.store, "show")
        assert said.code == 0
        assert "target traces" in said.stdout
        assert "mixed" in said.stdout
        assert said.stderr == ""

    def test_lookup_answers_in_every_form(self, tuned: Tuned) -> None:
        """A sentence for people, the run's document for programs, and what an engine takes."""
        name = policies.read(tuned.said.document["policy"]).headline.setup.name
        plainly, document, choice = (
            call(tuned.store, "lookup", *form) for form in ([], ["--json"], ["--format", "json"])
        )
        assert plainly.stdout.startswith(f"{name}: measured on mixed prompts at batch 1, context 64\n")
        assert {key: value for key, value in document.document.items() if key in KEYS - {"cost"}} == {
            key: value for key, value in tuned.said.document.items() if key in KEYS - {"cost"}
        }
        assert document.document["cost"].keys() == tuned.said.document["cost"].keys()
        assert '"domain": "mixed"' in choice.stdout
        assert call(tuned.store, "lookup", "--format", "transformers").code == 0
        assert [said.code for said in (plainly, document, choice)] == [0, 0, 0]

    def test_lookup_in_json_answers_what_was_asked(self, tuned: Tuned) -> None:
        """Beside the run's document stands the answer to the flags, here plain decoding beyond what was measured."""
        answer = call(tuned.store, "lookup", "--json", "--batch-size", "8").document["answer"]
        assert answer["matched"] is False
        assert answer["rule"] == "batch size 8 is beyond the largest measured, 1"
        assert answer["choice"] == {"draft": None, "length": 0}


def load_study(store: Path, kind: str) -> optuna.Study:
    """The first study whose name starts with `kind`."""
    storage = f"sqlite:///{store / 'optuna.db'}"
    name = next(name for name in optuna.get_all_study_names(storage) if name.startswith(kind))
    return optuna.load_study(study_name=name, storage=storage)


@pytest.mark.slow
class TestAWin:
    def test_a_draft_that_is_always_right_is_proven(self, won: Tuned) -> None:
        """Measured on this machine, on fresh prompts: the choice drafts, and the document says how it did."""
        document = won.said.document
        assert won.said.code == 0
        assert document["proven"] is True
        assert document["choice"]["draft"] in ("early-exit:1", "early-exit:2")
        assert document["speedup"]["low"] > 1.0
        assert document["chosen_tok_per_s"] > document["plain_tok_per_s"] > 0.0
        assert re.search(r"times as fast as plain decoding on \d\d other prompts", document["reason"])

    def test_forecasts_and_race_are_both_kept(self, won: Tuned) -> None:
        """The race's first trial is plain against plain, and each of its steps is one prompt."""
        assert len(load_study(won.store, "forecasts").trials) == studies.STORED_TRIALS
        race = load_study(won.store, "race").trials
        assert race[0].params == {"draft": "plain", "k": 0}
        assert len(race[0].intermediate_values) == 6
        assert {trial.params["draft"] for trial in race[1:]} <= {"early-exit:1", "early-exit:2"}
        assert {trial.state.name for trial in race} <= {"COMPLETE", "PRUNED"}

    def test_it_is_served_to_transformers(self, won: Tuned) -> None:
        """The snippet sets the early exit and the length that were measured."""
        said = call(won.store, "lookup", "--format", "transformers")
        choice = won.said.document["choice"]
        assert f'"assistant_early_exit": {choice["draft"].removeprefix("early-exit:")}' in said.stdout
        assert f"num_assistant_tokens = {choice['length']}" in said.stdout

    def test_a_rerun_repeats_it_from_the_store(self, won: Tuned) -> None:
        """Race and proof are reused too: the same figures without one measurement."""
        again = call(won.store, *won.words).document
        assert again["cost"]["measured_units"] == 0
        assert again["speedup"] == won.said.document["speedup"]


class TestInterruptions:
    @pytest.fixture
    def words(self, tiny_folders: dict[str, Path], prompts: Path) -> list[str]:
        return small_run(tiny_folders["llama"], prompts, *DRAFTS)

    def test_ctrl_c_keeps_what_was_measured(
        self, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Stopped after 9 target traces and 5 of a draft, a run says so and goes on from there when repeated."""
        with monkeypatch.context() as patch:
            patch.setattr(TorchEngine, "trace_draft", interrupted_after(5, TorchEngine.trace_draft))
            said = call(tmp_path, *words)
        assert said.code == 130
        assert said.stdout == ""
        last = said.stderr.splitlines()[-1]
        assert last.startswith("error: interrupted: 14 units of this run are saved in ")
        assert sum(evidence(tmp_path).values()) == 14
        assert_packs(tmp_path, tmp_path / "packed")
        assert_completes(words, tmp_path, 14)

    def test_ctrl_c_while_loading_is_one_line(
        self, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Before anything is measured there is nothing to keep."""
        with monkeypatch.context() as patch:
            patch.setattr("profiles.models.loader.load", interrupted_after(0, lambda: None))
            said = call(tmp_path, *words)
        assert (said.code, said.stdout, said.stderr) == (130, "", "error: interrupted\n")

    def test_a_spent_budget_ends_well(self, words: list[str], tmp_path: Path) -> None:
        """No unit is begun after the budget: plain decoding, and the reason says why."""
        said = call(tmp_path, *words, "--budget", "0.001")
        assert said.code == 5
        assert said.document["choice"] == {"draft": None, "length": 0}
        assert said.document["reason"].startswith("Plain decoding: the budget ended before anything could be compared")
        assert sum(evidence(tmp_path).values()) == 0
        assert call(tmp_path, "lookup").code == 0
        assert call(tmp_path, "report", "--out", tmp_path / "page.html").code == 3
        assert_packs(tmp_path, tmp_path / "packed")


def interrupted_after(count: int, method: Callable[..., Any]) -> Callable[..., Any]:
    """`method`, but Ctrl-C is pressed once it was called `count` times."""
    done = 0

    def interrupting(*args: Any, **options: Any) -> Any:
        nonlocal done
        if done == count:
            raise KeyboardInterrupt
        done += 1
        return method(*args, **options)

    return interrupting


def assert_completes(words: list[str], store: Path, kept: int) -> None:
    """The same command goes on from `kept` units and reaches a decision."""
    said = call(store, *words)
    cost = said.document["cost"]
    assert said.code in DECIDED
    assert cost["reused_units"] == kept
    assert cost["measured_units"] + kept >= UNITS_BEFORE_CALIBRATION + 3
    assert NUM_CHOICE_PROMPTS <= evidence(store)["target_traces"] <= NUM_PROMPTS
    assert sql(database(store), "PRAGMA integrity_check") == [("ok",)]


def test_lookup_loads_nothing_heavy(tuned: Tuned) -> None:
    """A deploy script asks in a fresh process: no torch, transformers, optuna or scipy is imported."""
    code = (
        "import sys, tune\n"
        "sys.argv = ['tune.py', 'lookup']\n"
        "try: tune.main()\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "print({'torch', 'transformers', 'optuna', 'sklearn', 'scipy'} & sys.modules.keys())\n"
    )
    environment = {**os.environ, "DRAFTPICK_STORE": str(tuned.store)}
    asked = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert asked.returncode == 0, asked.stderr
    *answer, heavy = asked.stdout.splitlines()
    assert answer[0].endswith("measured on mixed prompts at batch 1, context 64")
    assert heavy == "set()"


def test_a_run_over_batches(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    """A row per batch size, throughput from full queues; traces are shared, and a second run measures nothing."""
    words = small_run(tiny_folders["llama"], write_prompts(tmp_path / "prompts.jsonl", 15), "--draft")
    words += [str(tiny_folders["qwen2"]), "--batch-size", "1", "--batch-size", "3"]
    said = call(tmp_path / "store", *words)
    assert said.code in DECIDED, said.stderr
    assert [anchor["batch_size"] for anchor in said.document["anchors"]] == [1, 3]
    assert said.document["crossover_batch"] in (None, 1, 3)
    assert "batch" in said.stdout
    stored = tmp_path / "store" / "evidence.db"
    assert sql(stored, "SELECT DISTINCT batch_size FROM step_ms ORDER BY batch_size") == [(1,), (3,)]
    [(most,)] = sql(stored, "SELECT max(refills) FROM samples")
    assert most > 0
    [(num_traces, num_prompts)] = sql(stored, "SELECT count(*), count(DISTINCT prompt_digest) FROM target_traces")
    assert num_traces == num_prompts
    [(composites,)] = sql(stored, "SELECT count(*) FROM timed_runs WHERE setup LIKE 'ngram:max=4,min=2+%'")
    assert composites > 0
    again = call(tmp_path / "store", *words)
    assert again.document["cost"]["measured_units"] == 0
    report = call(tmp_path / "store", "report", "--out", str(tmp_path / "report.html"))
    assert report.code == 0, report.stderr
    answer = call(tmp_path / "store", "lookup", "--json", "--batch-size", "2").document["answer"]
    assert answer["rule"].startswith("measured on mixed prompts at batch 3")


def test_a_batch_of_one_prompt_is_decided(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    """Queues go round the only prompt; that is no interval, which is said, and nothing fails."""
    words = small_run(tiny_folders["llama"], write_prompts(tmp_path / "prompts.jsonl", 1), "--draft", "ngram")
    said = call(tmp_path / "store", *words, "--batch-size", "4")
    assert said.code in DECIDED, said.stderr
    assert said.document["proven"] is False


def test_a_refused_model_is_told_beside_its_composite(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    """`check` names the model's fault for both, and `run` lists it once."""
    bad = ["--draft", "nowhere", "--draft", "ngram+nowhere", "--draft", "ngram"]
    checked = call(tmp_path / "store", "check", "--target", str(tiny_folders["llama"]), *bad, "--json")
    problems = [row["problem"] for row in checked.document["drafts"]]
    assert problems[0] == problems[1] is not None
    assert problems[2] is None
    words = small_run(tiny_folders["llama"], write_prompts(tmp_path / "prompts.jsonl", 6), *bad)
    assert [row["name"] for row in call(tmp_path / "store", *words).not_measured] == ["nowhere"]

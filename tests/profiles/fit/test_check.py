"""A check of target and drafts: what fits, what does not and why, memory, and quick acceptance."""

import dataclasses
import io
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file

from profiles.fit.check import DraftCheck, FitReport, check
from profiles.prompts import tokens
from profiles.prompts.reader import Request
from profiles.records.draft_spec import parse_draft
from profiles.records.errors import InputError, ModelError
from tests.support import tiny
from tuner.cli.check import check_table

REQUESTS = [
    Request(messages=(("user", "the old garden"),), domain="garden"),
    Request(messages=(("user", "counting flowers"),), domain="garden"),
    Request(messages=(("user", "the river"),), domain="garden"),
    Request(messages="the lazy dog", domain="dogs"),
]
VALUES_PER_TOKEN = 2 * 3 * 2 * 8  # keys and values of the tiny Llama: layers, heads, values


@pytest.fixture(scope="module")
def nan(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A draft whose final norm holds NaN."""
    folder = tiny.write_model(tmp_path_factory.mktemp("nan") / "draft")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


@pytest.fixture
def stranger(tiny_folders: dict[str, Path], tmp_path: Path) -> str:
    """A draft with another token map of the same size."""
    folder = Path(shutil.copytree(tiny_folders["llama"], tmp_path / "stranger"))
    tiny.tokenizer(tiny.OTHER_TEXT).save_pretrained(folder)
    return str(folder)


def run(target: Path | str, *drafts: str, **shape: object) -> FitReport:
    return check(str(target), [parse_draft(text) for text in drafts], REQUESTS, **shape)  # type: ignore[arg-type]


def row(report: FitReport, name: str) -> DraftCheck:
    return next(draft for draft in report.drafts if draft.name == name)


def test_drafts_that_fit(tiny_folders: dict[str, Path]) -> None:
    """A model, an early exit and the look-up that is always shown: equal tokens, positions, acceptance at k = 4."""
    model = str(tiny_folders["gpt2"])
    report = run(tiny_folders["llama"], model, "early-exit:1")
    assert [draft.name for draft in report.drafts] == [model, "early-exit:1", "ngram:max=4,min=2"]
    assert [draft.max_positions for draft in report.drafts] == [256, 256, None]
    for draft in report.drafts:
        assert draft.problem is None
        assert draft.same_tokens
        quick = draft.quick_acceptance
        assert (quick.num_prompts, quick.num_tokens, quick.length) == (3, 96, 4)
        assert quick.acceptance_length is None or 1.0 <= quick.acceptance_length <= 5.0
    assert (report.batch_size, report.context_length, report.max_positions) == (1, 256, 256)
    assert report.notes == ("acceptance at k=4 over 3 prompts says little: `tune.py run` measures it",)


def test_the_target_as_its_own_draft(tiny_folders: dict[str, Path]) -> None:
    """Every proposal is kept: the figure is exact, and no weight is needed twice."""
    name = str(tiny_folders["llama"])
    draft = row(run(name, name), name)
    assert draft.quick_acceptance.acceptance_rate == 1.0
    assert draft.need.weight_bytes == 0


def test_memory_at_the_batch_and_context_asked(tiny_folders: dict[str, Path]) -> None:
    """Weights once, keys and values for batch times context; an early exit adds one layer's cache and no weights."""
    report = run(tiny_folders["llama"], "early-exit:1", batch_size=8, context_length=100, dtype="bfloat16")
    num_values = sum(tensor.numel() for tensor in load_file(tiny_folders["llama"] / "model.safetensors").values())
    assert report.dtype == "bfloat16"
    assert report.need.weight_bytes == 2 * num_values
    assert report.need.cache_bytes_per_token == 2 * VALUES_PER_TOKEN
    assert report.need.total_bytes(report.num_tokens) == 2 * (num_values + 800 * VALUES_PER_TOKEN)
    assert report.free_bytes > report.need.total_bytes(report.num_tokens)
    early, lookup = row(report, "early-exit:1").need, row(report, "ngram:max=4,min=2").need
    assert (early.weight_bytes, early.cache_bytes_per_token) == (0, 2 * VALUES_PER_TOKEN // 3)
    assert lookup.total_bytes(report.num_tokens) == 0


def test_the_json_form_tells_memory_in_all(tiny_folders: dict[str, Path]) -> None:
    """Of the target and of every draft whose size is known, at the shape asked for; it survives JSON as it is."""
    report = run(tiny_folders["llama"], "early-exit:1", "/nowhere", batch_size=8, context_length=100)
    raw = report.to_json()
    assert json.loads(json.dumps(raw)) == raw | {"drafts": list(raw["drafts"]), "notes": list(raw["notes"])}
    assert raw["need"]["total_bytes"] == report.need.weight_bytes + 800 * report.need.cache_bytes_per_token
    early, missing, lookup = (draft["need"] for draft in raw["drafts"])
    assert early == {"weight_bytes": 0, "cache_bytes_per_token": 128, "total_bytes": 102_400}
    assert missing is None
    assert lookup == {"weight_bytes": 0, "cache_bytes_per_token": 0, "total_bytes": 0}


def test_a_draft_that_fails_does_not_hide_the_others(tiny_folders: dict[str, Path], nan: str, stranger: str) -> None:
    """Missing, NaN, other tokens, too many layers: each row has its reason, the good draft its acceptance."""
    good = str(tiny_folders["qwen2"])
    report = run(tiny_folders["llama"], "/nowhere", nan, stranger, "early-exit:3", good)
    assert row(report, good).quick_acceptance is not None
    for name, words in (
        ("/nowhere", "no such directory"),
        (nan, "model.norm.weight holds NaN or infinity"),
        (stranger, "different token maps (300 and 300 tokens)"),
        ("early-exit:3", "allowed are 1 to 2"),
    ):
        failed = row(report, name)
        assert words in failed.problem
        assert failed.quick_acceptance is None
    assert row(report, stranger).same_tokens is False
    assert row(report, nan).same_tokens is None


def test_a_draft_that_does_not_fit_in_memory(
    tiny_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Needed and free are told; the target alone fits."""
    large = str(tiny.write_model(tmp_path / "large", num_layers=30))
    monkeypatch.setattr("profiles.models.memory.free_bytes", lambda device: 600_000)
    report = run(tiny_folders["llama"], large, context_length=100)
    assert "GiB of float32 weights" in row(report, large).problem


def test_positions_of_the_draft(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    """A draft of 64 positions cannot follow to 100; without a context asked for, only the short outputs must fit."""
    short = str(tiny.write_model(tmp_path / "short", max_position_embeddings=64))
    failed = row(run(tiny_folders["llama"], short, context_length=100), short)
    assert "context 100: model" in failed.problem
    assert "has 64 positions" in failed.problem
    assert row(run(tiny_folders["llama"], short), short).quick_acceptance is not None


@tiny.READS_GGUF
def test_a_dequantised_draft_is_noted(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    """What a GGUF file holds and how it is run stands below the table."""
    packed = str(tiny.write_gguf(tmp_path / "draft.gguf", tiny_folders["llama"], "Q8_0"))
    report = run(tiny_folders["llama"], packed)
    assert row(report, packed).problem is None
    assert "a GGUF of Q8_0 weights, dequantised and run as float32" in report.notes[0]


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ({"batch_size": 0}, "batch size 0: at least 1"),
        ({"context_length": 0}, "context 0: at least 1"),
        ({"context_length": 257}, "context 257: model .* has 256 positions"),
        ({"dtype": "int4"}, "dtype 'int4': allowed are"),
        ({"device": "abacus"}, "device 'abacus'"),
    ],
)
def test_a_question_that_cannot_be_answered(
    tiny_folders: dict[str, Path], shape: dict[str, object], words: str
) -> None:
    """What holds for every draft is an error: the value and what is allowed."""
    with pytest.raises(InputError, match=words):
        run(tiny_folders["llama"], **shape)


def test_a_target_that_cannot_be_loaded(nan: str) -> None:
    """There is nothing to check drafts against."""
    with pytest.raises(ModelError, match="holds NaN"):
        run(nan)
    with pytest.raises(ModelError, match="no such directory"):
        run("/nowhere")


def test_prompts_are_of_as_many_domains_as_there_are(
    tiny_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three of four, of both domains, and the same ones again."""
    asked: list[Request] = []
    tokenize = tokens.tokenize

    def watched(requests: list[Request], *rest: object, **options: object) -> object:
        asked.extend(requests)
        return tokenize(requests, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("profiles.prompts.tokens.tokenize", watched)
    for _ in range(2):
        run(tiny_folders["llama"])
    assert {request.domain for request in asked[:3]} == {request.domain for request in REQUESTS}
    assert asked[:3] == asked[3:]


def test_without_prompts_those_that_ship_are_taken(tiny_folders: dict[str, Path]) -> None:
    """So that a pair can be looked at before there are prompts."""
    report = check(str(tiny_folders["llama"]), [parse_draft("early-exit:1")])
    assert report.drafts[0].quick_acceptance is not None


def test_the_table_shows_rows_reasons_and_notes(tiny_folders: dict[str, Path]) -> None:
    """On 80 columns nothing is cut off; a file's name may look like markup."""
    report = run(tiny_folders["llama"], "/nowhere", "early-exit:1", context_length=100)
    report = dataclasses.replace(report, target="[red]llama")
    console = Console(width=80, record=True, file=io.StringIO(), markup=False)
    console.print(check_table(report))
    text = console.export_text()
    assert "[red]llama, float32 on" in text
    assert "256 positions; weights" in text
    assert "at batch 1, context 100;" in text
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    assert lines["/nowhere"] == ["/nowhere", "-", "-", "-", "-", "-", "-", "-"]
    assert lines["early-exit:1"][:6] == ["early-exit:1", "yes", "256", "0", "bytes", "128"]
    assert "cannot be used: model '/nowhere': no such directory or file" in text
    assert "says little" in text

"""A stranger's bundle can do no harm: what is not allowed is refused in one line, and the store stays as it was."""

import gzip
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from store.evidence_store import EvidenceStore
from tests.support import policies as made
from tests.support.bundles import fill, refused, resealed, sealed, update
from tests.support.fakes import sql
from tuner.bundle import bundle
from tuner.bundle.sanitize import clean_text
from tuner.policy import policy as policies


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of a store with one run."""
    folder = tmp_path_factory.mktemp("packed")
    with EvidenceStore.open(folder / "evidence.db") as evidence_store:
        fill(evidence_store)
        bundle.pack(evidence_store, folder / "one.bundle")
    return folder / "one.bundle"


@pytest.fixture
def empty(tmp_path: Path) -> Any:
    """An open store without a row."""
    with EvidenceStore.open(tmp_path / "empty" / "evidence.db") as evidence_store:
        yield evidence_store


OTHERS = policies.to_json(made.policy())
DEEP = "[" * 5000 + "]" * 5000
STRANGERS: dict[str, tuple[str | tuple[str, tuple[object, ...]], str]] = {
    "newer schema": ("PRAGMA user_version = 999", "it has schema 0999, this draftpick reads up to 00"),
    "no bundle": ("PRAGMA application_id = 1", "it is not a bundle"),
    "foreign table": ("CREATE TABLE alembic_version (version_num)", "its table 'alembic_version' is not of schema"),
    "view": ("CREATE VIEW v AS SELECT * FROM models", "its view 'v' is not of schema"),
    "trigger": (
        "CREATE TRIGGER t AFTER INSERT ON models BEGIN DELETE FROM models; END",
        "its trigger 't' is not of schema",
    ),
    "index": ("CREATE INDEX i ON models (hex(name))", "its index 'i' is not of schema"),
    "column more": ("ALTER TABLE models ADD COLUMN x", "its table 'models' is not of schema"),
    "column missing": ("ALTER TABLE samples DROP COLUMN refills", "its table 'samples' is not of schema"),
    "view in a table's place": ("DROP TABLE choices", "its table 'choices' is not of schema"),
    "no models": ("DELETE FROM models", "it is damaged: "),
    "no machines": ("DELETE FROM environments", "it is damaged: "),
    "no traces": ("DELETE FROM target_traces", "over a target trace of 0 tokens"),
    "half a unit": ("DELETE FROM samples WHERE position = 0", "a position is missing"),
    "empty unit": ("DELETE FROM samples", "it has 0 rows"),
    "number is text": (update("samples", "ttft_s", "one"), "units: ttft_s is str"),
    "count is float": (update("samples", "output_tokens", 7.5), "units: output_tokens is float"),
    "count is huge": (update("samples", "output_tokens", 2**40), "less than 2**31"),
    "negative time": (update("samples", "ttft_s", -1.0), "a run took -1.0"),
    "endless time": (update("samples", "decode_s", 1e999), "a finite number is needed"),
    "rounds text": (update("samples", "rounds", '[["a",1,2]]'), 'rounds'),
    "rounds short": (update("samples", "rounds", "[[1,2]]"), "rounds"),
    "rounds twice": (update("samples", "rounds", "[[1,1,2],[1,1,2]]"), "has a key twice"),
    "rounds wrong": (update("samples", "rounds", "[[1,2,1]]"), "round (1, 2)"),
    "rounds NaN": (update("samples", "rounds", "[[1,2,NaN]]"), "malformed"),
    "rounds deep": (update("samples", "rounds", DEEP), "units: "),
    "digest text": ("UPDATE setups SET digest = '../../etc' WHERE id = 1", "a digest is needed"),
    "wrong model digest": (update("models", "digest", "0" * 32), "models: key is "),
    "wrong machine": (update("environments", "device", "H100"), "environments: digest is "),
    "wrong dtype": (update("models", "dtype", "int8"), "dtype 'int8'"),
    "tokens text": (update("target_traces", "token_ids", "a"), "is not an array of numbers"),
    "tokens of another type": (update("target_traces", "token_ids", b"z123"), "is not an array of numbers"),
    "tokens cut": (update("target_traces", "token_ids", b"i123"), "target_traces: "),
    "trace short": (update("acceptance_traces", "accept_probs", b"b\x01"), "unequal length"),
    "probability": (update("acceptance_traces", "accept_probs", b"b" + b"\x02" * 64), "outside 0 to 1"),
    "not a number": (update("target_traces", "logit_gaps", b"d" + b"\xff" * 8 * 64), "not finite"),
    "no seconds": (update("step_times", "samples_s", b"d"), "step times at width 1"),
    "time not UTC": (update("policies", "created_at", "2020-01-01T00:00:00+02:00"), "a UTC time is needed"),
    "run outcome": (update("runs", "outcome", "[1]"), "an object is needed"),
    "run report": (update("runs", "outcome", '{"dossier":{"version":2}}'), "missing required field"),
    "run cost": (update("runs", "outcome", '{"cost":{"a":"b"}}'), 'cost'),
    "run workload": (update("runs", "workload", '{"batch_size":1}'), "workload: Object missing"),
    "policy empty": (update("policies", "policy", "{}"), "policies: policy: Object missing"),
    "policy is no JSON": (update("policies", "policy", "x"), "policies: "),
    "policy newer": (update("policies", "policy", '{"version":99}'), "version 99 is newer"),
    "policy of other": (update("policies", "policy", OTHERS), "target_key is "),
    "generation": (update("policies", "generation", 2**30), "generation 1073741824"),
    "long text": (update("infeasible", "detail", "x" * 10**6), "65536 are allowed"),
    "long key": (update("runs", "outcome", '{"' + "k" * 999 + '":1}'), "longer than 200"),
    "very long text": (update("infeasible", "detail", "x" * (bundle.MOST_VALUE_BYTES + 9)), "it is damaged: "),
}  # fmt: skip


class TestStrangers:
    @pytest.mark.parametrize("name", STRANGERS)
    def test_it_is_refused(self, name: str, packed: Path, empty: EvidenceStore, tmp_path: Path) -> None:
        """Well sealed but not allowed: one line says what and where, and the store stays empty."""
        statement, message = STRANGERS[name]
        said = refused(empty, resealed(packed, tmp_path / "strange", statement))
        assert said.startswith(f"bundle {tmp_path / 'strange'}: ")
        assert message in said
        assert len(said) < 600

    def test_a_file_of_another_kind(self, packed: Path, tmp_path: Path, empty: EvidenceStore) -> None:
        """Nothing, another program's file, a bundle of 0.5.0, a whole store, a cut or longer file, a folder."""
        whole = packed.read_bytes()
        cases = {
            b"": "it is not a bundle",
            b"\x89PNG\r\n": "it is not a bundle",
            b"draftpick-bundle 1 00\n" + gzip.compress(b"{}"): "of draftpick 0.5 or older: merge it there",
            empty.database.path.read_bytes(): "it is not a bundle",
            whole[:-1]: "damaged",
            whole + b"\n": "damaged",
            whole[:90_000] + b"x" + whole[90_001:]: "damaged",
        }
        for number, (written, reason) in enumerate(cases.items()):
            path = tmp_path / str(number)
            path.write_bytes(written)
            assert reason in refused(empty, path)
        assert "damaged" in refused(empty, sealed(tmp_path / "cut", whole[:40_000]))
        assert "No such file" in refused(empty, tmp_path / "missing")
        assert "Is a directory" in refused(empty, tmp_path)

    def test_a_large_file_is_not_read(
        self, packed: Path, tmp_path: Path, empty: EvidenceStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The limits hold before anything is checked."""
        monkeypatch.setattr(bundle, "MOST_BYTES", 1000)
        assert "1000 are allowed" in refused(empty, packed)

    def test_a_journal_beside_it_is_ignored(self, packed: Path, tmp_path: Path, empty: EvidenceStore) -> None:
        """SQLite would roll a stranger's journal back into the file."""
        path = tmp_path / "b"
        path.write_bytes(packed.read_bytes())
        (tmp_path / "b-journal").write_bytes(b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7" + bytes(4096))
        (tmp_path / "b-wal").write_bytes(b"x" * 4096)
        assert bundle.merge(empty, path).added["policies"] == 1
        assert path.read_bytes() == packed.read_bytes()

    def test_a_bundle_is_a_database(self, packed: Path) -> None:
        """Anyone can read it with the sqlite3 shell; the checksum behind it does not disturb."""
        connection = sqlite3.connect(packed)
        assert connection.execute("SELECT draft, k FROM choices").fetchall() == [("draft-a", 2)]
        connection.close()

    def test_names_are_harmless(self, packed: Path, tmp_path: Path, empty: EvidenceStore) -> None:
        """A name that climbs folders or commands a terminal is cut to what may be shown."""
        policy = sql(packed, "SELECT policy FROM policies")[0][0]
        policy = policy.replace('"name":"fake-target"', '"name":"../../../etc/passwd"')
        reason = policies.from_json(policy).headline.reason
        policy = policy.replace(reason, "see /etc/x/shadow\\u0007 k=2 100 tok/s")
        strange = resealed(
            packed,
            tmp_path / "strange",
            update("models", "name", "../../../etc/pass\x1b[2Jwd"),
            update("policies", "policy", policy),
        )
        bundle.merge(empty, strange)
        assert sql(empty.database.path, "SELECT name FROM models") == [("imported:pass [2Jwd",)]
        assert policies.from_json(str(empty.latest_policy())).headline.reason == "see shadow  k=2 100 tok/s"

    def test_what_is_left_of_one_path_begins_no_other(self) -> None:
        assert clean_text("docker -v /home/a/x:/home/b/secret") == "docker -v secret"

    @pytest.mark.parametrize(
        ("text", "wanted"),
        {
            "/home/me/llama": "imported:llama",
            "/home/me/my models/llama k=4": "imported:llama k=4",
            "/home/me/llama.GGUF": "imported:llama.GGUF",
            "eagle:/home/me/my head": "eagle:imported:my head",
            "ngram:max=4,min=2+/home/me/my models/llama k=4": "ngram:max=4,min=2+imported:llama k=4",
            "imported:draft one": "imported:draft one",
            "imported:carried:/home/me/draft one": "imported:draft one",
            "carried:draft one": "imported:draft one",
            "meta-llama/Llama-3": "meta-llama/Llama-3",
            "C:\\Users\\me\\m": "imported:m",
            "~/m": "imported:m",
            "/": "imported:unnamed",
            "C:/" * 1000: "imported:unnamed",
            "builtin:target": "builtin:target",
        }.items(),
    )
    def test_names_lose_their_folders(self, text: str, wanted: str) -> None:
        """Cleaning twice is cleaning once."""
        cleaned = clean_text(text, is_name=True)
        assert cleaned == clean_text(cleaned, is_name=True)
        assert cleaned == wanted or "/" not in cleaned

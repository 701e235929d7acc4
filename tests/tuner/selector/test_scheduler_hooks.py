"""DraftpickScheduler over a stand-in for vLLM's; over the real one: `test_vllm_scheduler.py`."""

import importlib
import logging
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from profiles.records.errors import InputError
from tests.support.policies import learning_policy
from tuner.policy.policy import write

NGRAM = {"method": "ngram", "model": None, "prompt_lookup_max": 4, "prompt_lookup_min": 2}


class Scheduler:
    """What DraftpickScheduler uses of vLLM's."""

    def __init__(self, *, vllm_config: Any) -> None:
        self.vllm_config, self.parallel_config = vllm_config, SimpleNamespace(data_parallel_rank=0)
        self.dynamic_sd_lookup, self.num_spec_tokens = [8] * 9, 8
        self.requests: dict[str, Any] = {}
        self.running: list[Any] = []

    def step(self, decoding: dict[str, int], **reading: int) -> Any:
        """Schedules rows with so many drafted tokens, and rows that read so many tokens; all drafts are kept."""
        scheduled = {name: 1 + drafted for name, drafted in decoding.items()} | reading
        drafts = {name: [0] * drafted for name, drafted in decoding.items() if drafted}
        output = SimpleNamespace(
            num_scheduled_tokens=scheduled, scheduled_spec_decode_tokens=drafts, finished_req_ids=set()
        )
        self.schedule()
        self._update_after_schedule(output)
        index = {name: number for number, name in enumerate(scheduled)}
        tokens = [[0] * (1 + decoding.get(name, 0)) for name in scheduled]
        self.update_from_output(output, SimpleNamespace(req_id_to_index=index, sampled_token_ids=tokens))
        return output

    def schedule(self) -> None: ...

    def _update_after_schedule(self, output: Any) -> None: ...

    def update_from_output(self, output: Any, answer: Any) -> Any: ...

    def has_unfinished_requests(self) -> bool:
        return True


class AsyncScheduler(Scheduler): ...


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The product's module, imported over the stand-in."""
    contents: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.logger": {"init_logger": logging.getLogger},
        "vllm.v1.core.sched.async_scheduler": {"AsyncScheduler": AsyncScheduler},
        "vllm.v1.core.sched.scheduler": {"Scheduler": Scheduler},
    }
    path = tmp_path_factory.mktemp("policy") / "policy.json"
    write(path, learning_policy())
    with pytest.MonkeyPatch.context() as patch:
        for name, values in contents.items():
            stand_in = ModuleType(name)
            stand_in.__dict__.update(values)
            patch.setitem(sys.modules, name, stand_in)
        patch.setenv("DRAFTPICK_POLICY", str(path))
        patch.setenv("DRAFTPICK_METRICS", "")
        loaded = importlib.import_module("tuner.selector.vllm_scheduler")
        patch.setattr(loaded, "version", lambda _: "0.32.0+cpu")
        yield loaded
        del sys.modules["tuner.selector.vllm_scheduler"]


def vllm_config(speculative: SimpleNamespace, *, asynchronous: bool = False) -> SimpleNamespace:
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(async_scheduling=asynchronous),
        speculative_config=speculative,
        model_config=SimpleNamespace(model="the target"),
    )


def scheduler_of(module: ModuleType, *, asynchronous: bool = False) -> Any:
    config = vllm_config(SimpleNamespace(**NGRAM), asynchronous=asynchronous)
    made = module.DraftpickScheduler(vllm_config=config)
    sampling = SimpleNamespace(temperature=0.0, extra_args=None)
    for name in ("a", "b"):
        made.requests[name] = SimpleNamespace(
            request_id=name,
            sampling_params=sampling,
            num_tokens=30,
            num_computed_tokens=30,
            num_output_placeholders=0,
            max_tokens=100_000,
            is_finished=lambda: False,
        )
    return made


def test_the_class_follows_the_loop(module: ModuleType) -> None:
    assert type(scheduler_of(module)).__name__ == "DraftpickScheduler"
    assert type(scheduler_of(module, asynchronous=True)).__name__ == "AsyncDraftpickScheduler"


def test_a_request_that_reads_its_text_again_is_no_row(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A preempted request resumes with its whole text in one step: what it drafted before was never verified."""
    scheduler = scheduler_of(module)
    reports: list[Any] = []
    selector = scheduler._controller.policy_file.selector
    monkeypatch.setattr(selector, "observe", reports.append)
    contexts: list[Any] = []
    choose = selector.choose

    def recorded(**arguments: Any) -> Any:
        contexts.extend(request.context_length for request in arguments["requests"])
        return choose(**arguments)

    monkeypatch.setattr(selector, "choose", recorded)
    output = scheduler.step({}, a=30, b=30)
    assert output.num_spec_tokens_to_schedule == 0  # nothing was measured at batch 2 that pays
    scheduler.step({"a": 0}, b=30)
    assert [(report.ids, report.rows, report.seconds) for report in reports] == [(("a",), ((0, 0),), None)]
    scheduler.step({"a": 0, "b": 0})
    assert reports[-1].ids == ("a", "b")
    assert reports[-1].seconds is not None
    assert set(contexts) == {30}  # what is there, not what may come


def test_a_full_disk_does_not_end_serving(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are written no more."""
    monkeypatch.setenv("DRAFTPICK_STEPS", "/dev/full")
    scheduler = scheduler_of(module)
    scheduler.step({}, a=30)
    scheduler.step({"a": 0})
    assert scheduler._reporter._file is None


def test_a_policy_of_another_server_is_refused_or_warned_of(
    module: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    """Refused where it has no figures of the draft; another engine's or target's is a warning."""
    with pytest.raises(InputError, match=r"the server drafts with eagle P; .*\"method\": \"ngram\""):
        module.loaded_drafts(learning_policy(), vllm_config(SimpleNamespace(method="eagle", model="P")))
    module.loaded_drafts(learning_policy(), vllm_config(SimpleNamespace(**NGRAM)))
    assert [record.getMessage() for record in caplog.records] == [
        "the policy was measured on torch: its times are not this server's",
        "the policy is of the target family/target, the server runs the target",
    ]

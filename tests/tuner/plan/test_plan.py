"""Plans: shapes, step times, acceptance, and what the command says."""

import json
import math
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from profiles.builtin import BUILTIN_FOLDER, TARGET
from profiles.records.draft_spec import parse_draft
from profiles.records.errors import InputError, ModelError, NotMeasuredError
from store.evidence_store import EvidenceStore, Scope
from tests import ROOT
from tests.support.cli import call
from tests.support.fakes import DRAFT_A, GREEDY, MACHINE, FakeEngine, prompts
from tests.support.fakes import TARGET as FAKE_TARGET
from tuner.plan import acceptance, stored
from tuner.plan.acceptance import rate_of, tokens_per_round
from tuner.plan.plan import PlanQuery, make_plan, planned_draft
from tuner.plan.shape import head_shape, read_data, read_shape, shape_of
from tuner.plan.step_time import StepModel, read_engine, read_hardware

LLAMA_70B = PlanQuery(
    target="Llama-3.1-70B", drafts=["Llama-3.2-1B"], hardware="H100x4", engine="vllm", acceptance="0.8"
)


def changed(**fields: object) -> PlanQuery:
    values = {name: getattr(LLAMA_70B, name) for name in LLAMA_70B.__slots__}
    return PlanQuery(**{**values, **fields})


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [  # billions, as their makers state
        ("Llama-3.1-8B", 8.03, 7.5),
        ("Llama-3.2-1B", 1.24, 1.24),
        ("Qwen2.5-72B", 72.7, 71.5),
        ("Qwen3-235B-A22B", 235, 21.6),
        ("Qwen3-Next-80B-A3B", 79.6, 3.5),
        ("DeepSeek-V3", 671, 36.6),
        ("Kimi-K2", 1026, 31.7),
        ("gpt-oss-120b", 116.8, 5.1),
    ],
)
def test_published_shapes_have_the_sizes_that_their_makers_state(name: str, total: float, active: float) -> None:
    shape = read_shape(name)
    values = shape.dense + shape.expert * shape.num_experts + shape.head + shape.stored
    assert values / 1e9 == pytest.approx(total, rel=0.005)
    assert shape.active / 1e9 == pytest.approx(active, rel=0.02)


def test_experts_touched_grow_with_tokens_to_all_of_them() -> None:
    shape = read_shape("Qwen3-30B-A3B")
    expert_bytes = shape.expert * shape.bits / 8
    touched = [(shape.step_bytes(tokens) - shape.step_bytes(0)) / expert_bytes for tokens in (1, 8, 10_000)]
    assert touched == pytest.approx([8, 128 * (1 - (1 - 8 / 128) ** 8), 128])


def test_a_directory_is_sized_by_its_headers() -> None:
    folder = BUILTIN_FOLDER / "target"
    shape = read_shape(str(folder))
    assert shape.format == "float16"
    assert shape.weight_bytes == pytest.approx((folder / "model.safetensors").stat().st_size, rel=0.01)
    assert read_shape(TARGET).format == "float32"  # as it is run on a CPU


def test_a_gguf_is_read_by_its_metadata(tmp_path: Path) -> None:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    def number(key: str, value: int) -> bytes:
        return text(f"llama.{key}") + struct.pack("<II", 4, value)

    config = {"block_count": 16, "embedding_length": 2048, "feed_forward_length": 8192}
    heads = {"attention.head_count": 32, "attention.head_count_kv": 8, "attention.key_length": 64}
    fields = [text("general.architecture") + struct.pack("<I", 8) + text("llama")]
    fields += [number(key, value) for key, value in {**config, **heads}.items()]
    fields += [text("llama.rope.freq_base") + struct.pack("<If", 6, 5e5)]
    fields += [text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 3) + text("a") * 3]
    path = tmp_path / "model.gguf"
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, len(fields)) + b"".join(fields) + bytes(1_000_000))
    shape = read_shape(str(path))
    assert (shape.layers, shape.hidden, shape.head) == (16, 2048, 3 * 2048)
    assert shape.weight_bytes == path.stat().st_size
    path.write_bytes(b"GGUF" + bytes(9))
    with pytest.raises(ModelError):
        read_shape(str(path))


def test_every_device_and_engine_that_ships_can_be_read() -> None:
    for name in read_data("hardware"):
        hardware = read_hardware(f"{name}x2")
        assert (hardware.count, bool(hardware.source)) == (2, True)
        for engine in read_data("engines"):
            assert read_engine(engine, hardware).source
    assert read_hardware("NVIDIA H100 80GB HBM3").name == read_hardware("H800").name == "H100"


def step_model(engine: str, hardware: str = "H100") -> StepModel:
    devices = read_hardware(hardware)
    return StepModel(hardware=devices, engine=read_engine(engine, devices))


def test_a_gptq_kernel_of_four_rows_makes_a_kink_between_four_and_five() -> None:
    target, steps = read_shape("Llama-3.1-70B", "gptq-int4"), step_model("exllamav2")
    seconds = [steps.step_s(target, 1, width, 1000) for width in range(1, 10)]
    assert max(seconds[:4]) < 1.01 * seconds[0]
    assert seconds[4] > 1.8 * seconds[3]
    assert seconds[4:8] == pytest.approx(seconds[4:5] * 4)
    flat = step_model("vllm")
    assert flat.step_s(target, 1, 9, 1000) < 1.05 * flat.step_s(target, 1, 1, 1000)


@pytest.mark.parametrize(("engine", "slope"), [("llamacpp", (0.15, 0.4)), ("vllm", (0.0, 0.02))])
def test_rows_cost_what_the_kernels_of_the_engine_make_of_them(engine: str, slope: tuple[float, float]) -> None:
    steps, target = step_model(engine, "RTX3090"), read_shape("Qwen3.5-27B", "Q4_K_M")
    narrow, wide = (steps.step_s(target, 1, width, 1000) for width in (1, 2))
    assert slope[0] <= wide / narrow - 1 <= slope[1]


def test_cached_tokens_devices_and_launches_count() -> None:
    steps, target = step_model("vllm"), read_shape("Llama-3.1-8B")
    assert steps.step_s(target, 8, 1, 100_000) > 2 * steps.step_s(target, 8, 1, 1000)
    assert steps.step_s(target, 1, 1, 1000) > step_model("vllm", "H100x4").step_s(target, 1, 1, 1000)
    turns = [step_model("llamacpp", name).step_s(target, 1, 1, 1000) for name in ("H100", "H100x4")]
    assert turns[1] > turns[0]
    tiny = shape_of("tiny", {**read_data("models")["Llama-3.2-1B"], "hidden_size": 64, "intermediate_size": 64})
    assert steps.step_s(tiny, 1, 1, 10) == pytest.approx(16 * steps.engine.layer_s)
    past_graphs = [steps.step_s(tiny, 64, width, 1) for width in (8, 9)]  # 512 and 576 rows
    assert past_graphs[1] > 3 * past_graphs[0]


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.99])
def test_rate_and_tokens_are_inverse(rate: float) -> None:
    assert rate_of(tokens_per_round(rate, 5), 5) == pytest.approx(rate, abs=1e-6)


def test_heads_are_small_parts_of_their_target() -> None:
    target = read_shape("Qwen3-32B")
    mtp, eagle = head_shape(target, "mtp"), head_shape(target, "eagle3")
    assert mtp.head == target.head
    assert eagle.active < mtp.active < 0.06 * target.active


def test_a_published_head_is_no_copy_of_the_target_in_its_name_and_a_suffix_has_no_weights() -> None:
    target = read_shape("Qwen3-8B-AWQ")
    assert target.format == "awq-int4"
    named = planned_draft(parse_draft("eagle3:RedHatAI/Qwen3-8B-speculator.eagle3"), target, None).shape
    assert named == planned_draft(parse_draft("eagle3"), target, None).shape
    assert planned_draft(parse_draft("suffix"), target, None).shape is None


def test_a_hub_that_cannot_be_reached_is_one_line_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"'nobody/some-model': the hub cannot be asked .*config\.json") as caught:
        read_shape("nobody/some-model")
    assert "\n" not in str(caught.value)


def test_files_that_were_not_downloaded_are_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(read_data("models")["Qwen3-8B"]))
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        read_shape(str(tmp_path))


def test_a_plan_covers_every_draft_length_and_batch() -> None:
    plan = make_plan(changed(drafts=["Llama-3.2-1B", "native:eagle3"], batch_sizes=(1, 16), lengths=(1, 4)))
    assert len(plan["setups"]) == 2 * 2 * 2
    assert plan["status"] == "planned"
    for setup in plan["setups"]:
        assert setup["low"] < setup["speedup"] < setup["high"]
        rounds_s = setup["tokens_per_round"] / setup["cost"]
        assert setup["tok_per_s"] / setup["plain_tok_per_s"] == pytest.approx(rounds_s, rel=0.01)
    for choice in plan["choices"]:
        assert len(choice["narrow"]) == 3
        best = max(
            (row for row in plan["setups"] if row["batch_size"] == choice["batch_size"]), key=lambda row: row["speedup"]
        )
        assert (choice["draft"], choice["k"]) == (best["draft"], best["k"])


def test_a_draft_that_cannot_gain_is_refused_with_the_acceptance_it_needs() -> None:
    query = {"target": "Llama-3.1-405B", "hardware": "H800x3", "dtype": "gptq-int4", "engine": "exllamav2"}
    plan = make_plan(changed(**query, acceptance="0.02", lengths=(4,)))
    [setup], [choice] = plan["setups"], plan["choices"]
    assert choice["draft"] is None
    assert f"{setup['break_even']:.2f}" in choice["reason"]
    gains = make_plan(changed(**query, acceptance=str(setup["break_even"] + 0.02), lengths=(4,)))["choices"]
    assert gains[0]["draft"] == "Llama-3.2-1B"


def test_gains_of_a_dense_target_end_at_a_batch() -> None:
    plan = make_plan(changed(target="Llama-3.1-8B", hardware="L4x4", context=64, lengths=(4, 8), acceptance="0.5"))
    end = plan["choices"][0]["crossover_batch"]
    assert end is not None
    assert end > 8


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"hardware": "H100"}, "141 GB of 80"),
        ({"hardware": "H9000"}, "H9000"),
        ({"hardware": "H100x0"}, "H100x0"),
        ({"engine": "warp"}, "warp"),
        ({"dtype": "int3"}, "int3"),
        ({"target": "nobody-7B"}, "nobody-7B"),
        ({"batch_sizes": (0,)}, "batch sizes 0"),
        ({"acceptance": "1.5"}, "1.5"),
        ({"acceptance": "missing.json"}, "missing.json"),
        ({"drafts": ["ngram+Llama-3.2-1B"]}, "ngram"),
        ({"drafts": ["ngram"], "acceptance": "published"}, "ngram"),
        ({"acceptance": "store"}, "--store"),
        ({"target": "DeepSeek-R1-Distill-Qwen-7B"}, "no such directory"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(fields: dict[str, object], part: str) -> None:
    with pytest.raises((InputError, NotMeasuredError)) as caught:
        make_plan(changed(**fields))
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_unusable_draft_is_left_out() -> None:
    plan = make_plan(changed(drafts=["Llama-3.2-1B@fp8", "/no@body/1B"]))
    assert [row["draft"] for row in plan["left_out"]] == ["/no@body/1B"]
    assert "/no@body/1B" in plan["left_out"][0]["reason"]


def test_acceptance_of_a_file_is_by_domain_and_by_position(tmp_path: Path) -> None:
    path = tmp_path / "acceptance.json"
    path.write_text(json.dumps({"Llama-3.2-1B": {"code": [0.9, 0.5], "prose": 0.5}}))
    plan = make_plan(changed(acceptance=str(path), lengths=(1, 2, 3)))
    tokens = {(row["domain"], row["k"]): row["tokens_per_round"] for row in plan["setups"]}
    assert tokens == {
        ("code", 1): 1.9, ("code", 2): 2.4, ("prose", 1): 1.5, ("prose", 2): 1.75, ("prose", 3): 1.875
    }  # fmt: skip
    path.write_text(json.dumps({"Llama-3.2-1B": [0.9]}))
    with pytest.raises(InputError, match="no share for lengths of 2"):
        make_plan(changed(acceptance=str(path), lengths=(2, 3)))


def test_published_acceptance_says_how_near_it_is() -> None:
    name = "lmsys/sglang-EAGLE3-LLaMA3.3-Instruct-70B"
    pair = acceptance.published("Llama-3.3-70B-Instruct", f"native:eagle3+{name}", "eagle3", (3,))
    target = acceptance.published("Llama-3.3-70B-Instruct", "native:eagle3", "eagle3", (3,))
    other = acceptance.published("Llama-3.1-405B", "native:eagle3", "eagle3", (3,))
    assert "of this pair" in pair.source
    assert "on this target" in target.source
    assert "elsewhere" in other.source
    assert "elsewhere" in acceptance.published("my-model", "mtp", "mtp", (3,)).source
    assert "of this pair" in acceptance.published("Qwen2.5-72B-Instruct", "Qwen2.5-7B", "model", (3,)).source
    assert other.rounds[3].low < other.rounds[3].tokens < other.rounds[3].high


def test_the_store_gives_exact_rounds_and_its_step_times_win(tmp_path: Path) -> None:
    engine, scope = FakeEngine(), Scope(target=FAKE_TARGET, environment=MACHINE, workload=GREEDY)
    with EvidenceStore.open(tmp_path / "evidence.db") as store:
        for prompt in prompts(6):
            trace = store.save_target_trace(scope, prompt, engine.trace_target(GREEDY, prompt))
            store.save_acceptance(scope, prompt, DRAFT_A, engine.trace_draft(GREEDY, prompt, trace, DRAFT_A, 4))
        store.save_step_times(scope, (DRAFT_A,), 4, engine.time_steps(GREEDY, 100, 4))
        [mixed, *_] = stored.acceptance(store, FAKE_TARGET.name, DRAFT_A.name, (1, 2))
        assert 1.0 <= mixed.rounds[1].tokens <= mixed.rounds[2].tokens <= 3.0
        about = FAKE_TARGET.name, "float32", MACHINE.device, MACHINE.engine
        measured = stored.step_times(store, *about)[GREEDY.batch_size]
        assert measured.round_s(DRAFT_A.name, 2, True) is not None
        assert stored.step_times(store, FAKE_TARGET.name, "bfloat16", MACHINE.device, MACHINE.engine) == {}
        with pytest.raises(NotMeasuredError):
            stored.acceptance(store, FAKE_TARGET.name, "another", (1,))


def test_rounds_between_timed_lengths_lie_on_a_line() -> None:
    """Where whole rounds were timed at some lengths; beyond them nothing is known."""
    measured = stored.MeasuredTimes(device="x", context=1, seconds={"target": {1: 1.0}, "d": {2: 2.0, 5: 5.0, 9: 7.0}})
    assert [measured.round_s("d", length, True) for length in (0, 1, 2, 4, 6, 8, 9)] == [1, 2, 3, 5, 6, 7, None]


def test_the_command_loads_no_model_library_and_takes_a_file_of_hardware(tmp_path: Path) -> None:
    device = {"bandwidth_gb": 100, "memory_gb": 500, "link_gb": 0, "tflops": {"vector": 1, "fp16": 1, "fp8": 1}}
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"hardware": {"mine": device}}))
    script = (
        "import sys; from tuner.cli.app import app; "
        f"app(['plan', '--target', 'Llama-3.1-8B', '--draft', 'Llama-3.2-1B', '--hardware', {str(path)!r}, "
        "'--acceptance', '0.8', '--json'], standalone_mode=False); "
        "print(sorted({'torch', 'numpy', 'transformers', 'sklearn', 'scipy'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    document = json.loads(done.stdout)
    assert document["hardware"]["name"] == "mine"
    assert all(math.isfinite(row["speedup"]) for row in document["setups"])


def test_people_see_what_a_plan_rests_on(tmp_path: Path) -> None:
    done = call(tmp_path, "plan", "--target", "Llama-3.1-8B", "--draft", "native:eagle3", "--hardware", "H100")
    assert done.stdout.startswith("planned: Llama-3.1-8B in bfloat16 on H100x1 with vllm")
    assert "rests on acceptance of eagle3: published" in done.stdout

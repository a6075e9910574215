"""What logging steps say about speed and memory."""

import json

import pytest

from accelerate_unsloth.readings import RankReading, summary

from .launching import WORKERS, launch, result

OURS = {
    "tokens_per_second",
    "token_imbalance",
    "slowest_rank",
    "slowest_rank_step_s",
    "fastest_rank_step_s",
    "host_memory_gib",
}


def test_the_ranks_are_summed_up():
    ranks = [
        RankReading(tokens=100, wall_s=4.0, own_s=1.0, steps=2, peak_gib=3.0, reserved_gib=3.5, host_gib=1.0),
        RankReading(tokens=300, wall_s=4.0, own_s=3.8, steps=2, peak_gib=5.0, reserved_gib=6.0, host_gib=1.5),
    ]
    assert summary(ranks) == {
        "tokens_per_second": 100.0,
        "token_imbalance": 1.5,
        "slowest_rank": 1,
        "slowest_rank_step_s": 1.9,
        "fastest_rank_step_s": 0.5,
        "peak_memory_gib": 5.0,
        "reserved_memory_gib": 6.0,
        "host_memory_gib": 2.5,
    }


def test_without_a_gpu_or_a_step_nothing_is_made_up():
    found = summary([RankReading()])
    assert found["tokens_per_second"] == 0.0
    assert "peak_memory_gib" not in found


@pytest.mark.launch
@pytest.mark.parametrize("mode", ["after_backward", "overlapped"])
def test_the_readings_reach_tensorboard(mode, tiny_model, uneven_data, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logs = tmp_path / "logs"
    options = {
        "args": {"report_to": "tensorboard", "gradient_accumulation_steps": 2},
        "plugin": {"gradient_sync": mode},
    }
    finished = launch(
        WORKERS / "train.py",
        [tiny_model, uneven_data, tmp_path, json.dumps(options)],
        environment={"HF_HOME": str(tmp_path / "cache"), "TENSORBOARD_LOGGING_DIR": str(logs)},
    )
    assert finished.status == 0, finished.output[-3000:]
    (folder,) = {file.parent for file in tmp_path.rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    assert {f"train/{name}" for name in OURS} <= set(events.Tags()["scalars"])
    values = {name: [event.value for event in events.Scalars(f"train/{name}")] for name in OURS}
    assert len(values["tokens_per_second"]) == len(result(tmp_path)["losses"])
    assert all(value > 0 for value in values["tokens_per_second"])
    assert all(1 <= value <= 2 for value in values["token_imbalance"])
    slow, fast = values["slowest_rank_step_s"], values["fastest_rank_step_s"]
    assert all(slower >= faster > 0 for slower, faster in zip(slow, fast, strict=True))


@pytest.mark.slow
@pytest.mark.launch
def test_the_monitor_can_be_switched_off(tiny_model, uneven_data, tmp_path):
    finished = launch(
        WORKERS / "train.py",
        [tiny_model, uneven_data, tmp_path, json.dumps({"plugin": {"monitor": False}})],
        processes=1,
        environment={"HF_HOME": str(tmp_path / "cache")},
    )
    assert finished.status == 0, finished.output[-3000:]
    assert "tokens_per_second" not in finished.output
    assert "'loss'" in finished.output

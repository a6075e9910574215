"""What logging steps say about speed and memory."""

import json
from types import SimpleNamespace

import pytest

from accelerate_unsloth.reporting.memory_warnings import PressureWatch, find
from accelerate_unsloth.reporting.readings import RankReading, summary

from ..launching import WORKERS, launch, result

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


def gpu(peak_gib=10.0, reachable_gib=24.0, retries=0):
    return RankReading(peak_gib=peak_gib, reachable_gib=reachable_gib, alloc_retries=retries)


def host(available_gib, total_gib=64.0):
    return RankReading(host_available_gib=available_gib, host_total_gib=total_gib)


@pytest.mark.parametrize(
    ("ranks", "found"),
    [
        ([gpu(), gpu()], []),
        ([gpu(), gpu(retries=2)], [("gpu retries", (1,))]),
        ([gpu(peak_gib=22.79), gpu(peak_gib=22.7)], []),  # 95% of 24 is 22.8
        ([gpu(peak_gib=22.9), gpu(), gpu(peak_gib=23.5)], [("gpu full", (0, 2))]),
        # Other processes hold the rest of this GPU; a large cache of our own does not count.
        ([gpu(peak_gib=11.6, reachable_gib=12.0)], [("gpu full", (0,))]),
        ([gpu(peak_gib=23.5, retries=1)], [("gpu retries", (0,)), ("gpu full", (0,))]),
        ([host(3.3), host(3.2)], []),
        ([host(3.3), host(3.1)], [("host", (1,))]),
        ([gpu(peak_gib=1.0, reachable_gib=0.0)], []),  # all of it is somebody else's by now
        ([RankReading()], []),
    ],
)
def test_memory_pressure_is_found_with_its_ranks(ranks, found):
    assert [(pressure.kind, pressure.ranks) for pressure in find(ranks)] == found


@pytest.mark.parametrize(
    ("reading", "words"),
    [
        (gpu(retries=3), ["rank 0 ran full 3 time(s)", "Lower memory_fraction or micro_batch_tokens"]),
        (gpu(peak_gib=23.5), ["23.50 of 24.00 GiB", "gradient_checkpointing='unsloth'"]),
        (host(1.25), ["1.25 of 64.00 GiB are left", "lower dataloader_num_workers"]),
    ],
)
def test_a_warning_of_memory_pressure_says_figures_and_remedy(reading, words):
    (pressure,) = find([reading])
    assert [word for word in words if word not in pressure.message] == []


def test_each_kind_of_memory_pressure_is_told_once():
    watch = PressureWatch()
    assert len(watch.new_warnings([gpu(retries=1)])) == 1
    assert watch.new_warnings([gpu(retries=5)]) == []
    assert len(watch.new_warnings([gpu(retries=1, peak_gib=23.5)])) == 1
    assert list(watch.messages) == ["gpu retries", "gpu full"]


def test_rank_0_alone_warns_of_the_pressure_on_any_rank(monkeypatch):
    from accelerate_unsloth.trainers import reporting

    warnings = []
    monkeypatch.setattr(reporting.logger, "warning", warnings.append)
    for is_main in (False, True):
        trainer = reporting.ReportMixin.__new__(reporting.ReportMixin)
        trainer._pressure, trainer.state = PressureWatch(), SimpleNamespace(global_step=5)
        trainer._monitor = SimpleNamespace(read=lambda step: [gpu(), gpu(peak_gib=23.5)])
        trainer.is_world_process_zero = lambda is_main=is_main: is_main
        assert trainer._read_ranks()["peak_memory_gib"] == 23.5
        assert len(warnings) == int(is_main)
    assert "rank 1 is nearly full" in warnings[0]


def test_a_gpu_is_read_as_the_driver_and_pytorch_tell(monkeypatch):
    import torch

    from accelerate_unsloth.reporting.monitor import Monitor

    gib, retries = 2**30, iter([4, 7, 7, 9])
    told = {"max_memory_allocated": 10 * gib, "max_memory_reserved": 12 * gib, "memory_reserved": 11 * gib}
    for name, value in told.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (3 * gib, 24 * gib))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU X")
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: {"num_alloc_retries": next(retries)})
    monitor = Monitor(torch.device("cuda"))
    monitor.on_train_begin(None, None, None)
    (first,), (second,) = monitor.read(1), monitor.read(2)
    assert (first.device, first.peak_gib, first.reserved_gib, first.reachable_gib) == ("GPU X", 10, 12, 14)
    assert (first.alloc_retries, second.alloc_retries) == (3, 0)  # those since the last log, not those of the probe
    assert first.host_total_gib > first.host_available_gib > 0
    assert [interval.step for interval in monitor.history] == [1, 2]
    monitor.on_train_begin(None, None, None)  # of a second train()
    assert monitor.history == []


@pytest.mark.parametrize(
    ("cached", "free", "in_the_way"),
    [(8, 1, True), (2, 1, False), (8, 12, False), (2.5, 5.9, True), (2.4, 5.9, False), (2.5, 6, False), (0, 0, False)],
)
def test_a_large_cache_is_released_if_memory_is_scarce(cached, free, in_the_way):
    from accelerate_unsloth.trainers.reporting import cache_is_in_the_way

    assert cache_is_in_the_way(cached, free, 24) is in_the_way


def test_on_a_cpu_no_cache_is_released(monkeypatch):
    import torch

    from accelerate_unsloth.trainers.reporting import release_cache_if_in_the_way

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: pytest.fail("queried a GPU"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: pytest.fail("emptied a cache"))
    release_cache_if_in_the_way(torch.device("cpu"))


def test_the_cache_is_checked_before_and_after_an_evaluation(monkeypatch):
    from accelerate_unsloth.trainers import reporting

    order = []

    class Evaluating:
        def _evaluate(self, trial):
            order.append("evaluation")
            return {"eval_loss": 2.0}

    class Trainer(reporting.ReportMixin, Evaluating):
        def __init__(self):
            self._clock, self.args = reporting._RunClock(), SimpleNamespace(device="a GPU")

    monkeypatch.setattr(reporting, "release_cache_if_in_the_way", order.append)
    trainer = Trainer()
    assert trainer._evaluate(None) == {"eval_loss": 2.0}
    assert order == ["a GPU", "evaluation", "a GPU"]
    assert trainer._clock.spent.evaluation_s > 0


@pytest.mark.launch
def test_the_readings_reach_tensorboard(tiny_model, uneven_data, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logs = tmp_path / "logs"
    options = {
        "args": {"report_to": "tensorboard", "gradient_accumulation_steps": 2},
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


@pytest.mark.launch
def test_steps_that_log_ask_nothing_of_the_store(tiny_model, uneven_data, tmp_path):
    options = {
        "args": {"gradient_accumulation_steps": 2, "num_train_epochs": 2, "logging_steps": 1},
        "note_store_requests": True,
    }
    finished = launch(
        WORKERS / "train.py",
        [tiny_model, uneven_data, tmp_path, json.dumps(options)],
        environment={"HF_HOME": str(tmp_path / "cache")},
    )
    assert finished.status == 0, finished.output[-3000:]
    for rank in (0, 1):
        assert result(tmp_path, rank)["store_requests"] == [[]] * 12  # 22 samples, 4 in a step, twice
    assert "waitForInput" not in finished.output


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

"""Custom training loops: the same steps on any number of processes, whatever the user's DataLoader."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader, IterableDataset
from transformers import AutoModelForCausalLM

from accelerate_unsloth import AggregationMethod, MultiGPUTrainer, UnslothPlugin
from accelerate_unsloth.policies import aggregation

from ..launching import WORKERS, launch

# What a launch trains, by its number of processes; the effective batch is 4 samples in all of them.
ACCUMULATION = {1: 4, 2: 2, 4: 1}
TRAININGS = {
    "whole": {"epochs": [None, 2], "evaluate": True},
    "stream": {"stream": True, "samples": 21},
    "by number": {"plugin": {"balance_tokens": False}},
    "own sampler": {"own_sampler": True, "epochs": [6, 2]},
}


@pytest.fixture(scope="module")
def ran(tiny_model, uneven_data, tmp_path_factory):
    """Run a training on so many processes, all of TRAININGS in one launch: its folder."""
    folders = {}

    def run(processes):
        if processes not in folders:
            folder = folders[processes] = tmp_path_factory.mktemp("loop")
            shared = {"batch": 1, "accumulation": ACCUMULATION[processes]}
            trainings = {name: shared | options for name, options in TRAININGS.items()}
            if processes == 2:
                first = shared | {"epochs": [3], "save": str(folder / "checkpoint")}
                trainings["first half"] = first
                drawn = {"own_sampler": True, "epochs": [1, 2], "save": str(folder / "drawn")}
                trainings["first half, own sampler"] = first | drawn
            if processes == 1:
                second = shared | {"load": str(run(2) / "checkpoint"), "epochs": [None, 2]}
                trainings["second half"] = second
                drawn = {"own_sampler": True, "load": str(run(2) / "drawn"), "epochs": [3]}
                trainings["second half, own sampler"] = second | drawn
            start(tiny_model, uneven_data, folder, trainings, processes)
        return folders[processes]

    return run


def start(model, data, folder, trainings, processes, expect=0):
    finished = launch(WORKERS / "loop.py", [model, data, folder, json.dumps(trainings)], processes)
    assert (finished.status == 0) == (expect == 0), finished.output[-4000:]
    return finished.output


def result(folder, name, rank=0):
    return json.loads((folder / name / f"result{rank}.json").read_text())


def losses(folder, name):
    return [entry["loss"] for entry in result(folder, name)["logs"]]


def difference(first, second):
    """The largest relative difference of a weight tensor."""
    one, other = load_file(first), load_file(second)
    assert one.keys() == other.keys()
    return max(float((one[n] - other[n]).norm() / one[n].norm().clamp(min=1e-9)) for n in one)


# ---- Exactness ----


@pytest.mark.launch
@pytest.mark.parametrize("name", TRAININGS)
@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_give_the_losses_and_weights_of_one(ran, name, processes):
    assert losses(ran(processes), name) == pytest.approx(losses(ran(1), name), rel=1e-5)
    for rank in range(processes):
        weights = ran(processes) / name / f"weights{rank}.safetensors"
        assert difference(ran(1) / name / "weights0.safetensors", weights) < 1e-4


@pytest.mark.launch
def test_learning_rate_gradient_norm_and_tokens_do_not_depend_on_the_processes(ran):
    one, four = (result(ran(processes), "whole") for processes in (1, 4))
    assert len(one["logs"]) == 6 + 2  # 22 samples in effective batches of 4, and two steps more
    for name in ("learning_rate", "grad_norm", "num_tokens", "step", "epoch"):
        assert [e[name] for e in one["logs"]] == pytest.approx([e[name] for e in four["logs"]], rel=1e-4), name
    assert one["evaluation"]["eval_loss"] == pytest.approx(four["evaluation"]["eval_loss"], rel=1e-6)
    assert one["evaluation"]["eval_samples"] == four["evaluation"]["eval_samples"] == 22
    assert one["position"] == four["position"] == [1, 2, 8]


@pytest.mark.launch
@pytest.mark.parametrize("name", TRAININGS)
def test_an_epoch_tells_what_each_rank_did(ran, name):
    samples = TRAININGS[name].get("samples", 22)
    one, four = (result(ran(processes), name)["stats"][0] for processes in (1, 4))
    for stats in (one, four):
        assert stats["samples"] == sum(count for _, count in stats["ranks"]) == samples
        assert stats["tokens"] == sum(tokens for tokens, _ in stats["ranks"])
    assert one["loss"] == pytest.approx(four["loss"], rel=1e-5)
    assert one["steps"] == four["steps"] == 6
    assert (len(one["ranks"]), len(four["ranks"])) == (1, 4)


@pytest.mark.launch
@pytest.mark.parametrize("name", ["whole", "stream", "own sampler"])
def test_gathered_results_are_in_the_order_of_the_data_without_repeats(ran, name):
    for processes in (1, 2, 4):
        for rank in range(processes):
            found = result(ran(processes), name, rank)
            assert found["gathered"] == found["expected"]


@pytest.mark.launch
def test_only_rank_0_calls_callbacks(ran):
    assert result(ran(2), "whole", rank=1)["logs"] == []


@pytest.mark.launch
def test_a_run_goes_on_in_the_middle_of_an_epoch_on_another_number_of_processes(ran):
    whole, second = losses(ran(1), "whole"), losses(ran(1), "second half")
    assert losses(ran(2), "first half") == pytest.approx(whole[:3], rel=1e-5)
    assert second == pytest.approx(whole[3:], rel=1e-5)
    weights = [ran(1) / name / "weights0.safetensors" for name in ("whole", "second half")]
    assert difference(*weights) < 1e-4
    assert result(ran(1), "second half")["position"] == [1, 2, 8]


@pytest.mark.launch
def test_what_a_sampler_drew_is_kept_until_the_epoch_ends(ran):
    """A run in one go, against three steps in two calls on two processes and three more in one that took them over."""
    whole = losses(ran(1), "own sampler")[:6]
    assert losses(ran(2), "first half, own sampler") == pytest.approx(whole[:3], rel=1e-5)
    assert losses(ran(1), "second half, own sampler") == pytest.approx(whole[3:], rel=1e-5)
    assert result(ran(1), "second half, own sampler")["position"] == [1, 0, 6]


@pytest.mark.launch
@pytest.mark.parametrize("method", ["mean", "sum"])
def test_mean_and_sum_are_over_ranks(method, tmp_path):
    """Against the same gradient worked out here, by hand, with the samples that each rank got."""
    finished = launch(WORKERS / "aggregate.py", [tmp_path, method], processes=3)
    assert finished.status == 0, finished.output[-4000:]
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["rank_batches"] == [2, 2, 1]  # five micro-batches; the last rank runs out first
    assert found["buffers"] == [1.0 + 8.0] * 3  # what rank 0 has seen
    by_rank = [[], [], []]
    for number, value in enumerate([1.0, 2.0, 4.0, 8.0, 16.0]):
        by_rank[number % 3].append(value)
    # The loss of a micro-batch is weight x value, so its gradient is its value.
    first = [rank[:1] for rank in by_rank]
    second = [rank[1:] for rank in by_rank if rank[1:]]
    mean_of = {
        "mean": lambda ranks: sum(sum(r) / len(r) for r in ranks) / len(ranks),
        "sum": lambda r: sum(map(sum, r)),
    }
    expected = [mean_of[method](ranks) for ranks in (first, second)]
    assert found["gradients"] == pytest.approx(expected)


@pytest.mark.launch
def test_an_order_may_be_larger_than_a_message_of_the_store(tmp_path):
    samples = 1_300_000  # above 8 MiB as text, at which the store closes the connection
    finished = launch(WORKERS / "drawn_order.py", [tmp_path, samples], processes=2)
    assert finished.status == 0, finished.output[-4000:]
    for rank in (0, 1):
        found = json.loads((tmp_path / f"result{rank}.json").read_text())
        assert found == {"first": [1_299_999, 1_299_998, 1_299_997], "length": samples}


@pytest.mark.launch
def test_an_error_of_a_sampler_of_rank_0_ends_all_with_one_message(tmp_path):
    finished = launch(WORKERS / "aggregate.py", [tmp_path, "an error of the sampler"], processes=2)
    assert finished.status != 0
    assert finished.output.count("RuntimeError: this sampler is broken") == 1, finished.output[-4000:]


# ---- Errors ----


@pytest.mark.launch
@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ("samples", "samples of the loader: 5 on rank 0; 6 on rank 1"),
        ("contents", "64 samples of the loader: "),
        ("max_steps", "max_steps: 1 on rank 0; 2 on rank 1"),
        ("frozen", "Frozen weights or buffers of rank(s) 1 are not those of rank 0: frozen. Load"),
        ("learning rate", "lr of the optimizer: 0.01 on rank 0; 0.02 on rank 1"),
        ("not finite", "The loss or a gradient of step 1 is not finite on rank 1"),
        ("an error on one rank", "RuntimeError: this loader is broken"),
    ],
)
def test_what_is_wrong_on_one_rank_ends_all_with_one_message(broken, words, tmp_path):
    finished = launch(WORKERS / "aggregate.py", [tmp_path, broken], processes=2)
    assert finished.status != 0
    assert finished.output.count(words) == 1, finished.output[-4000:]


def model():
    torch.manual_seed(0)
    return torch.nn.Linear(2, 1)


def loss_fn(model, batch):
    return model(batch).square().mean()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"aggregation_method": "median"}, "choose one of mean, sum, token_mean"),
        ({"aggregation_method": AggregationMethod.TOKEN_MEAN}, "Pass count_items"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0 is not a whole number"),
        ({"max_grad_norm": -1.0}, "max_grad_norm=-1.0 is not above 0"),
        ({"optimizer_config": {"lr": 1e-4}}, '"class": a class'),
        ({"optimizer_config": {"class": torch.optim.SGD, "kwargs": {}, "lr": 1e-4}}, '"class": a class'),
    ],
)
def test_options_that_contradict_each_other_are_rejected(options, words):
    with pytest.raises(ValueError, match=words):
        MultiGPUTrainer(model(), loss_fn=loss_fn, **options)


@pytest.mark.parametrize("number", [0, -1, 1.5, True])
def test_what_is_no_number_of_gpus_is_rejected(number):
    with pytest.raises(ValueError, match="is not a whole number of at least 1"):
        MultiGPUTrainer(model(), num_gpus=number, loss_fn=loss_fn)


def test_more_gpus_than_processes_end_with_the_command_to_type():
    with pytest.raises(SystemExit) as ended:
        MultiGPUTrainer(model(), num_gpus=2, loss_fn=loss_fn)
    assert ended.value.code == 2


def trained(**options):
    trainer = MultiGPUTrainer(model(), loss_fn=loss_fn, **options)
    trainer.train_epoch(DataLoader(torch.ones(8, 2), batch_size=2))
    return trainer


@pytest.mark.parametrize("file", ["trained.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_damaged_checkpoint_is_rejected_before_anything_is_loaded(file, tmp_path):
    trained().save_checkpoint(tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / file).write_bytes(b"")
    fresh = MultiGPUTrainer(model(), loss_fn=loss_fn)
    before = [p.clone() for p in fresh.model.parameters()]
    with pytest.raises(ValueError, match=f"not a complete checkpoint: {file} has 0 bytes"):
        fresh.load_checkpoint(tmp_path / "checkpoint")
    assert all(torch.equal(now, then) for now, then in zip(fresh.model.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gradient_accumulation_steps": 2}, "micro-batches of a step=1, now 2"),
        ({"aggregation_method": "sum"}, "aggregation_method='mean', now 'sum'"),
        ({"seed": 1}, "seed=42, now 1"),
        (
            {"scheduler_config": {"class": torch.optim.lr_scheduler.ExponentialLR, "kwargs": {"gamma": 0.9}}},
            "optimizer, scheduler and scaler",
        ),
    ],
)
def test_a_checkpoint_of_another_training_is_rejected(options, words, tmp_path):
    trained().save_checkpoint(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match=words):
        MultiGPUTrainer(model(), loss_fn=loss_fn, **options).load_checkpoint(tmp_path / "checkpoint")


@pytest.mark.parametrize(
    ("loader", "words"),
    [
        (DataLoader(torch.ones(8, 2), batch_size=1), "samples of a step=2, now 1"),
        (DataLoader(torch.ones(10, 2), batch_size=2), "samples=8, now 10"),
        (DataLoader(torch.ones(8, 2), batch_size=2, drop_last=True), "drop_last=False, now True"),
        (DataLoader(torch.ones(8, 2), batch_size=2, shuffle=True), "order of the samples='sequential', now 'random'"),
        (DataLoader(torch.ones(8, 2), batch_sampler=[[0, 1], [2, 3]]), "now 'sampler'"),
    ],
)
def test_an_epoch_is_ended_with_the_loader_it_was_begun_with(loader, words, tmp_path):
    begun = MultiGPUTrainer(model(), loss_fn=loss_fn)
    begun.train_epoch(DataLoader(torch.ones(8, 2), batch_size=2), max_steps=1)
    begun.save_checkpoint(tmp_path / "checkpoint")
    fresh = MultiGPUTrainer(model(), loss_fn=loss_fn)
    fresh.load_checkpoint(tmp_path / "checkpoint")
    for trainer in (begun, fresh):
        with pytest.raises(ValueError, match=words):
            trainer.train_epoch(loader)
        assert trainer.train_epoch(DataLoader(torch.ones(8, 2), batch_size=2)).num_steps == 3
    assert fresh.train_epoch(loader).num_samples == len(loader.sampler if loader.batch_size else [0, 1, 2, 3])


@pytest.mark.parametrize("rows", [torch.ones(7, 2), [torch.ones(2)] * 7])
def test_max_steps_at_the_end_of_an_epoch_closes_it(rows):
    class Rows(IterableDataset):
        def __iter__(self):
            return iter(rows)

    for loader in (DataLoader(rows, batch_size=2), DataLoader(Rows(), batch_size=2)):
        trainer = MultiGPUTrainer(model(), loss_fn=loss_fn)
        assert trainer.train_epoch(loader, max_steps=4).num_steps == 4
        assert (trainer.epoch, trainer.step_in_epoch) == (1, 0)
        assert trainer.train_epoch(loader, max_steps=3).num_steps == 3
        assert (trainer.epoch, trainer.step_in_epoch) == (1, 3)


def test_a_checkpoint_is_replaced_and_leaves_nothing_beside_it(tmp_path):
    trainer = trained()
    trainer.save_checkpoint(tmp_path / "checkpoint")
    trainer.train_epoch(DataLoader(torch.ones(8, 2), batch_size=2))
    trainer.save_checkpoint(tmp_path / "checkpoint")
    again = MultiGPUTrainer(model(), loss_fn=loss_fn)
    again.load_checkpoint(tmp_path / "checkpoint")
    assert (again.epoch, again.global_step) == (2, 8)
    assert all(torch.equal(a, b) for a, b in zip(again.trainable, trainer.trainable, strict=True))
    moments = [t.optimizer.state_dict()["state"][0]["exp_avg"] for t in (again, trainer)]
    assert torch.equal(*moments)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_step_that_is_not_finite_is_skipped_where_asked_for():
    trainer = MultiGPUTrainer(model(), loss_fn=loss_fn, plugin=UnslothPlugin(on_nonfinite="skip"))
    rows = torch.ones(4, 2)
    rows[1, 0] = float("nan")
    before = [p.clone() for p in trainer.model.parameters()]
    trainer.train_epoch(DataLoader(rows, batch_size=2), max_steps=1)
    assert all(torch.equal(now, then) for now, then in zip(trainer.model.parameters(), before, strict=True))
    trainer.train_epoch(DataLoader(rows, batch_size=2))
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert not all(torch.equal(now, then) for now, then in zip(trainer.model.parameters(), before, strict=True))


def test_a_skipped_step_moves_no_schedule_and_is_no_loss_of_the_epoch():
    rows, logs = torch.ones(6, 2), []
    rows[2, 0] = float("nan")
    trainer = MultiGPUTrainer(
        model(),
        loss_fn=loss_fn,
        optimizer_config={"class": torch.optim.SGD, "kwargs": {"lr": 0.5}},
        scheduler_config={"class": torch.optim.lr_scheduler.ExponentialLR, "kwargs": {"gamma": 0.5}},
        callbacks=[lambda entry, step: logs.append(entry)],
        plugin=UnslothPlugin(on_nonfinite="skip"),
    )
    stats = trainer.train_epoch(DataLoader(rows, batch_size=2))
    assert [entry["learning_rate"] for entry in logs] == [0.5, 0.25, 0.25]
    assert stats.loss == pytest.approx((logs[0]["loss"] + logs[2]["loss"]) / 2)


@pytest.mark.parametrize("method", ["token_mean", "mean", "sum"])
def test_samples_whose_labels_are_all_masked_are_no_part_of_a_mean(method, tiny_model):
    causal = AutoModelForCausalLM.from_pretrained(tiny_model)
    row, masked = (
        {"input_ids": torch.arange(6), "labels": labels} for labels in (torch.arange(6), torch.full((6,), -100))
    )
    stands_still = {"class": torch.optim.SGD, "kwargs": {"lr": 0.0}}
    trainer = MultiGPUTrainer(causal, aggregation_method=method, optimizer_config=stands_still)
    found = [trainer.train_epoch(DataLoader(rows, batch_size=1)).loss for rows in ([row], [row, masked], [masked])]
    assert found[0] == pytest.approx(found[1])
    assert math.isnan(found[2])
    losses = [
        trainer.evaluate(DataLoader(rows, batch_size=1))["eval_loss"] for rows in ([row], [row, masked], [masked])
    ]
    assert losses[0] == pytest.approx(losses[1])
    assert math.isnan(losses[2])


def test_results_that_are_not_one_per_sample_are_rejected():
    trainer = trained()
    list(trainer.batches(DataLoader(torch.ones(5, 2), batch_size=2)))
    with pytest.raises(ValueError, match="got 3 results, but the last pass gave rank 0 5 samples"):
        trainer.gather([1, 2, 3])
    assert torch.equal(trainer.gather(torch.arange(5)), torch.arange(5))


def test_a_batch_without_a_loss_raises_an_error_that_names_the_fix():
    with pytest.raises(ValueError, match="Pass loss_fn="):
        MultiGPUTrainer(model()).train_epoch(DataLoader(torch.ones(2, 2)))


def test_an_epoch_is_planned_again_when_the_data_or_the_accumulation_changes():
    rows = [torch.ones(2)] * 4
    loader = DataLoader(rows, batch_size=2)
    trainer = MultiGPUTrainer(model(), loss_fn=loss_fn)
    assert trainer.train_epoch(loader).num_samples == 4
    rows += [torch.ones(2)] * 4
    assert trainer.train_epoch(loader).num_samples == 8
    del rows[2:]
    assert trainer.train_epoch(loader).num_samples == 2
    rows += [torch.ones(2)] * 6
    trainer.gradient_accumulation_steps = 2
    assert trainer.train_epoch(loader).num_steps == 2


# ---- Aggregation ----


@pytest.mark.parametrize(
    ("method", "items", "weights", "of_the_rank"),
    [
        ("token_mean", [30, 10, 0], [0.75, 0.25, 0.0], 40),
        ("mean", [30, 10, 0], [0.5, 0.5, 0.0], 1),
        ("sum", [30, 10, 0], [1.0, 1.0, 0.0], 1),
        ("token_mean", [], [], 0),
        ("mean", [0], [0.0], 0),
        ("sum", [], [], 0),
    ],
)
def test_micro_batches_and_ranks_weigh_what_the_method_says(method, items, weights, of_the_rank):
    assert aggregation.weights(AggregationMethod(method), items) == weights
    assert aggregation.rank_weight(AggregationMethod(method), items) == of_the_rank


@pytest.mark.parametrize(("counts", "method"), [(True, "token_mean"), (False, "mean")])
def test_tokens_weigh_where_they_can_be_counted(counts, method):
    choice = aggregation.resolve(None, counts)
    assert choice.method == method
    assert choice.reason

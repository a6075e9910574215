"""Projects that began with TRL's or Unsloth's own trainer: resume from its checkpoints, and leave them where they are."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from ..launching import WORKERS, launch, result

pytestmark = pytest.mark.launch

STOCK = ["checkpoint-2", "checkpoint-4"]  # and its last one, which is left out of what is resumed from
SAVING = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}


@pytest.fixture(scope="module")
def stock(tiny_model, uneven_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stock")
    environment = {"HF_HOME": str(folder / "cache")}
    finished = launch(WORKERS / "stock.py", [tiny_model, uneven_data, folder], processes=1, environment=environment)
    assert finished.status == 0, finished.output[-4000:]
    assert (folder / "run" / "checkpoint-6").is_dir()
    return folder


@pytest.fixture(scope="module")
def resume(stock, tiny_model, uneven_data, tmp_path_factory):
    """Resume in a copy of the stock run's folder: the copy, and what was printed."""

    def run(how, processes=2, accumulation=2, **options):
        folder = tmp_path_factory.mktemp("resumed")
        for name in STOCK:
            shutil.copytree(stock / "run" / name, folder / "run" / name)
        how = str(folder / "run" / "checkpoint-4") if how == "path" else how
        arguments = SAVING | {"gradient_accumulation_steps": accumulation} | options.pop("args", {})
        finished = launch(
            WORKERS / "train.py",
            [tiny_model, uneven_data, folder, json.dumps(options | {"args": arguments, "resume": how})],
            processes,
            environment={"HF_HOME": str(folder / "cache")},
        )
        assert finished.status == 0, finished.output[-4000:]
        return folder, finished.output

    return run


def checkpoint_names(folder):
    return sorted(path.name for path in (folder / "run").glob("checkpoint-*"))


@pytest.fixture(scope="module")
def by_path(resume):
    return resume("path")


@pytest.mark.parametrize("how", [True, "auto"])
def test_the_newest_stock_checkpoint_is_resumed_from_as_by_its_path(how, resume, by_path, stock):
    folder, output = resume(how)
    assert len(result(folder)["losses"]) == len(result(by_path[0])["losses"]) == 6
    assert result(folder)["losses"] == result(by_path[0])["losses"]
    found, same = (load_file(f / "weights0.safetensors") for f in (folder, by_path[0]))
    assert all(torch.equal(found[name], same[name]) for name in same)
    whole = load_file(stock / "weights0.safetensors")
    for name in whole:
        torch.testing.assert_close(found[name], whole[name], rtol=1e-4, atol=1e-5)
    assert "steps per epoch" not in output


def test_rotation_leaves_stock_checkpoints(by_path):
    assert checkpoint_names(by_path[0]) == [*STOCK, "checkpoint-6"]


def test_a_run_that_keeps_its_best_checkpoint_alone_leaves_stock_ones(resume):
    best = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    folder, _ = resume("auto", processes=1, accumulation=4, args=best, evaluate=True)
    assert set(STOCK) < set(checkpoint_names(folder))
    assert len(checkpoint_names(folder)) == 3


def test_another_number_of_steps_an_epoch_is_warned_of(resume):
    _, output = resume("auto", processes=1, accumulation=2, args={"save_strategy": "no", "max_steps": 5})
    assert output.count("checkpoint-4 was written with 6 steps per epoch, and this launch takes 11") == 1

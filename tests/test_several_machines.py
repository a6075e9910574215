"""Two launchers as two machines on the loopback, two CPU processes each."""

import json
import socket
import sys

import pytest

from .launching import WORKERS, finish, launch, launcher_command, result, start

pytestmark = pytest.mark.launch


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch_two_machines(arguments, caches, timeout_s=200):
    """The same command on both, as the configuration file tells it, with a cache folder for each machine."""
    port, machines = free_port(), []
    for rank, cache in enumerate(caches):
        command = [sys.executable, *launcher_command("unsloth_ddp_cpu", processes=4, port=port)]
        command += ["--num_machines", "2", "--machine_rank", str(rank), "--main_process_ip", "127.0.0.1"]
        command += [str(WORKERS / "train.py"), *map(str, arguments)]
        machines.append(start(command, {"HF_HOME": str(cache)}))
    return [finish(machine, timeout_s) for machine in machines]


@pytest.fixture(scope="module")
def one_process(tiny_model, uneven_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    options = {"args": {"gradient_accumulation_steps": 4}}
    finished = launch(
        WORKERS / "train.py",
        [tiny_model, uneven_data, folder, json.dumps(options)],
        processes=1,
        environment={"HF_HOME": str(folder / "cache")},
    )
    assert finished.status == 0, finished.output[-3000:]
    return folder


@pytest.mark.parametrize("share_a_disk", [True, False])
def test_two_machines_of_two_give_the_loss_curve_of_one_process(
    share_a_disk, one_process, tiny_model, uneven_data, tmp_path
):
    caches = [tmp_path / "cache" / ("shared" if share_a_disk else str(rank)) for rank in (0, 1)]
    options = {"args": {"gradient_accumulation_steps": 1}, "save": True}
    machines = launch_two_machines([tiny_model, uneven_data, tmp_path, json.dumps(options)], caches)
    assert [machine.status for machine in machines] == [0, 0], "".join(m.output[-2000:] for m in machines)
    assert result(tmp_path)["losses"] == pytest.approx(result(one_process)["losses"], rel=1e-5)
    # Each machine tokenises once, and one process in all writes.
    mapped = [max(result(tmp_path, rank)["mapped_rows"], default=0) for rank in range(4)]
    assert mapped[1] <= 8
    assert mapped[3] <= 8
    assert [bool(result(tmp_path, rank)["saves"]) for rank in range(4)] == [True, False, False, False]
    assert all(cache.is_dir() for cache in caches)


def test_an_error_on_one_machine_ends_the_other(tiny_model, uneven_data, tmp_path):
    options = {"args": {"gradient_accumulation_steps": 1}, "provoke": {"what": "kill", "rank": 3, "step": 2}}
    machines = launch_two_machines([tiny_model, uneven_data, tmp_path, json.dumps(options)], [tmp_path / "cache"] * 2)
    assert all(machine.status != 0 for machine in machines)

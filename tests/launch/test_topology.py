"""Which ranks share a machine: as torchelastic tells, or as the names of the machines do."""

import pytest
import torch
from safetensors.torch import load_file

from accelerate_unsloth.launch import topology
from accelerate_unsloth.launch.topology import Topology, is_located

from ..launching import WORKERS, Finished, finish, result, start_script
from ..workers.by_fork import free_port

TRAIN = WORKERS / "train.py"

ELASTIC = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1"}


def test_the_place_is_read_from_the_launchers_environment():
    assert Topology.from_environment(ELASTIC) == Topology(5, 8, 1, 4, 1, 4)
    assert Topology.from_environment({}) == Topology(0, 1, 0, 1, 0, 0)


@pytest.mark.parametrize("missing", ["LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK"])
def test_a_launcher_that_leaves_something_out_does_not_tell_which_ranks_share_a_machine(missing):
    assert is_located(ELASTIC)
    assert not is_located({name: value for name, value in ELASTIC.items() if name != missing})


def test_one_process_is_located_without_a_launcher():
    assert is_located({})


@pytest.mark.parametrize(
    ("hosts", "rank", "environment", "place"),
    [
        # As srun with LOCAL_RANK=$SLURM_LOCALID, and without it.
        (["a"] * 8 + ["b"] * 8, 9, {"LOCAL_RANK": "1"}, Topology(9, 16, 1, 8, 1, 8)),
        (["a"] * 8 + ["b"] * 8, 9, {}, Topology(9, 16, 1, 8, 1, 8)),
        (["a"] * 8 + ["b"] * 8, 0, {}, Topology(0, 16, 0, 8, 0, 0)),
        (["a", "b", "a", "b"], 3, {}, Topology(3, 4, 1, 2, 1, 1)),  # ranks assigned to machines round-robin
        (["b", "a", "a"], 2, {}, Topology(2, 3, 1, 2, 1, 1)),  # machines of different size
        (["a", "a"], 1, {"LOCAL_RANK": "0"}, Topology(1, 2, 0, 2, 0, 0)),  # a scheduler that shows each task one GPU
    ],
)
def test_names_of_machines_tell_which_ranks_share_one(hosts, rank, environment, place):
    assert Topology.from_hosts(hosts, rank, environment) == place


def test_one_process_of_each_machine_is_its_first():
    hosts = ["a", "b", "b", "a"]
    places = [Topology.from_hosts(hosts, rank, {"LOCAL_RANK": "0"}) for rank in range(4)]
    assert [place.is_local_main for place in places] == [True, True, False, False]


BY_HAND = """
import socket, runpy, sys
name, script, *sys.argv[1:] = sys.argv[1:]
socket.gethostname = lambda: name
runpy.run_path(script, run_name="__main__")
"""


def start_by_hand(arguments, machines, variables, folder) -> list[Finished]:
    """Two ranks without a launcher, each on a machine of that name, which has a cache folder of its own."""
    port, processes, script = free_port(), [], folder / "by_hand.py"
    script.write_text(BY_HAND)
    words = [str(TRAIN), *map(str, arguments)]
    for rank, (machine, its_variables) in enumerate(zip(machines, variables, strict=True)):
        environment = {
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "HF_HOME": f"{arguments[2]}/cache_of_{machine}",
            **its_variables,
        }
        processes.append(start_script([str(script), machine, *words], [], 1, environment))
    return [finish(process, 200) for process in processes]


@pytest.mark.launch
@pytest.mark.parametrize(
    ("machines", "variables", "mapped_rows"),
    [
        (("one", "other"), ({}, {}), [22, 22]),
        pytest.param(("one", "one"), ({"LOCAL_RANK": "0"}, {"LOCAL_RANK": "1"}), [22, 8], marks=pytest.mark.slow),
    ],
)
def test_ranks_that_no_launcher_started_train_together(
    machines, variables, mapped_rows, tiny_model, uneven_data, tmp_path
):
    finished = start_by_hand([tiny_model, uneven_data, tmp_path, "{}"], machines, variables, tmp_path)
    output = "".join(process.output[-3000:] for process in finished)
    assert [process.status for process in finished] == [0, 0], output
    one, other = (load_file(tmp_path / f"weights{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(one[name], other[name]) for name in one)
    # The first process of each machine tokenises all rows, the others of a machine a few.
    assert [max(result(tmp_path, rank)["mapped_rows"]) for rank in (0, 1)] == mapped_rows
    assert "Traceback" not in output
    assert "waitForInput" not in output


def test_importing_the_package_does_not_settle_the_place(monkeypatch):
    """A script may copy the variables of its scheduler after the import."""
    monkeypatch.setattr(topology, "_place", None)
    topology.declare_cpu_launch()
    assert topology._place is None

"""Where the real Unsloth puts the code that it generates, on two machines of one process each."""

from pathlib import Path

import pytest

from ..launching import WORKERS, result
from ..machines import launch_two_machines

pytestmark = [pytest.mark.launch, pytest.mark.unsloth]


@pytest.mark.parametrize("share_a_disk", [pytest.param(True, marks=pytest.mark.slow), False])
def test_each_machine_has_the_code_that_unsloth_generates(share_a_disk, tmp_path):
    folders = [tmp_path / "shared"] * 2 if share_a_disk else [tmp_path / "first", tmp_path / "second"]
    temporary = [tmp_path / f"tmp{node}" for node in (0, 1)]
    for folder in (*folders, *temporary):
        folder.mkdir(exist_ok=True)
    environments = [{"TMPDIR": str(folder)} for folder in temporary]
    machines = launch_two_machines(
        WORKERS / "unsloth_caches.py",
        [tmp_path],
        environments,
        processes=2,
        folders=folders,
        timeout_s=300,
        real_launcher=True,
    )
    assert [m.status for m in machines] == [0, 0], "".join(m.output[-3000:] for m in machines)

    ranks = [result(tmp_path, rank) for rank in (0, 1)]
    for when, module in (("before", "UnslothSFTTrainer"), ("after", "UnslothDPOTrainer")):
        assert [rank[when]["module"] for rank in ranks] == [module] * 2
        assert ranks[0][when]["digest"] == ranks[1][when]["digest"]
    # Before there is a process group machines do not know of each other, so none writes where another one does.
    own = [folders[0] / "unsloth_compiled_cache", folders[1] / "unsloth_compiled_cache_node1"]
    assert [Path(rank["before"]["file"]).parent for rank in ranks] == own
    # With one, Unsloth lets rank 0 write for all, or each machine for itself if one does not see what rank 0 wrote.
    apart = [temporary[0] / own[0].name, temporary[1] / own[1].name]
    assert [Path(rank["after"]["file"]).parent for rank in ranks] == (own[:1] * 2 if share_a_disk else apart)

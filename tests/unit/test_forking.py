"""Ranks forked from the fork server find and leave behind what those do that a real launcher starts."""

import os

import pytest

from ..launching import WORKERS, fork_server, launch, result

pytestmark = pytest.mark.launch

# Which port and which folder for error files the launcher has found free.
CHOSEN = ("MASTER_PORT", "TORCHELASTIC_ERROR_FILE")


def test_a_forked_rank_starts_as_one_that_the_launcher_starts(tmp_path):
    found, drawn = {}, []
    for way in ("real", "forked"):
        folder = tmp_path / way
        folder.mkdir()
        environment = {"HF_HOME": str(tmp_path / "home"), "ACCELERATE_UNSLOTH_MONITOR": "0"}
        finished = launch(
            WORKERS / "interpreter.py", [folder, "two words"], environment=environment, real_launcher=way == "real"
        )
        assert finished.status == 0, finished.output[-3000:]
        found[way] = [result(folder, rank)["found"] for rank in (0, 1)]
        drawn += [result(folder, rank)["drawn"] for rank in (0, 1)]
        for rank in found[way]:
            assert set(CHOSEN) <= rank["environment"].keys()
            for name in CHOSEN:
                del rank["environment"][name]
            assert rank["argv"].pop(1) == rank["orig_argv"].pop(3) == str(folder)
    assert found["forked"] == found["real"]
    assert found["forked"][1]["ours"] == []
    # The script has seeded nothing: each rank draws by itself, from Python's generator, NumPy's and perhaps PyTorch's.
    fixed = found["real"][0]["torch_seed_is_fixed"]
    assert [len(set(numbers)) for numbers in zip(*drawn, strict=True)] == [4, 4, 1 if fixed else 4]


ENDINGS = {
    "the end": "",
    "a status": "sys.exit(3)",
    "a message": "sys.exit('words')",
    "an error": "raise ValueError('lost')",
    "an error with a hook": "sys.excepthook = lambda kind, *_: print('hooked', kind)\nraise ValueError('lost')",
    "an interrupt": "raise KeyboardInterrupt",
    "a kill": "os.kill(os.getpid(), signal.SIGKILL)",
    "a thread": "threading.Timer(0.2, print, ['thread']).start()",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_forked_script_ends_as_a_fresh_one(ending, tmp_path):
    script = tmp_path / "script.py"
    beginning = (
        "import atexit, os, signal, sys, threading\natexit.register(print, 'exit')\nprint('said', flush=True)\n"
    )
    script.write_text(beginning + ENDINGS[ending] + "\n")
    real, forked = (launch(script, processes=1, real_launcher=real) for real in (True, False))

    def lines(finished):
        """Without the frames of tracebacks, which begin at the fork server."""
        return [line for line in finished.output.splitlines() if not line.startswith(" ")]

    assert forked.status == real.status
    assert lines(forked) == lines(real)
    assert "said" in lines(forked)


@pytest.mark.parametrize("processes", [1, 2])
def test_what_does_not_end_is_ended(processes, tmp_path):
    script = tmp_path / "endless.py"
    script.write_text("import os, time\nprint('pid', os.getpid(), flush=True)\ntime.sleep(100)\n")
    # A machine that had put the waiting fork server's memory away once took longer than 3 s to start two processes.
    with pytest.raises(AssertionError, match="no end after 8 s") as failure:
        launch(script, processes=processes, timeout_s=8)
    said = [line.split() for line in str(failure.value).splitlines()]
    pids = [int(words[1]) for words in said if words[:1] == ["pid"]]
    assert len(pids) == processes
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_what_is_read_at_import_takes_a_fresh_process():
    server = fork_server()
    assert server.serves(dict(server.environment) | {"HF_HOME": "/elsewhere", "ACCELERATE_UNSLOTH_ENGINE": "auto"})
    assert not server.serves(dict(server.environment) | {"TRANSFORMERS_VERBOSITY": "error"})
    assert not server.serves({name: value for name, value in server.environment.items() if name != "OMP_NUM_THREADS"})

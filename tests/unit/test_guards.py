"""What ends a run in order, without a Trainer."""

import os
import signal
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl, TrainerState

from accelerate_unsloth.launch.channel import PeerFailure
from accelerate_unsloth.reliability import failures, nonfinite
from accelerate_unsloth.trainers import guards as module
from accelerate_unsloth.trainers.guards import Guards, check_weights_are_equal


@pytest.fixture
def ranks(monkeypatch):
    """Two ranks, this one and another one whose answers are given."""
    others = {}
    channel = SimpleNamespace(gather=lambda name, value: [value, others.get(name, value)])
    for owner in (module, nonfinite):
        monkeypatch.setattr(owner, "channel", lambda: channel)
    monkeypatch.setattr(module, "topology", lambda: SimpleNamespace(world_size=2, is_main=True))
    return others


def test_a_stop_that_any_rank_voted_for_saves_and_ends_all_with_the_status_of_its_signal(ranks, tmp_path, capsys):
    guards = Guards(str(tmp_path), None, 1800)
    guards.note_votes(0)
    guards.exit_if_stopped(3)
    guards.note_votes(1)
    control = guards.on_step_end(None, TrainerState(), TrainerControl(should_evaluate=True))
    assert (control.should_save, control.should_training_stop, control.should_evaluate) == (True, True, False)
    ranks["signal"] = int(signal.SIGINT)  # the other rank's
    with pytest.raises(SystemExit) as ended:
        guards.exit_if_stopped(4)
    assert ended.value.code == 128 + signal.SIGINT
    assert "Stopped by a signal after step 4" in capsys.readouterr().err


def test_a_signal_is_a_request_while_training(ranks, tmp_path):
    guards = Guards(str(tmp_path), 0, 1800)
    with guards.around_training():
        assert not guards.wants_stop
        os.kill(os.getpid(), signal.SIGTERM)
        while not guards.wants_stop:
            pass
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_weights_that_differ_are_named_by_rank(ranks):
    model = torch.nn.Linear(2, 2)
    check_weights_are_equal(model, step=5)
    ranks["weights"] = 1
    with pytest.raises(RuntimeError, match=r"rank\(s\) 1 differ from rank 0's at step 5"):
        check_weights_are_equal(model, step=5)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_that_is_not_finite_is_skipped_or_ends_the_run(scaled, ranks):
    weight = torch.nn.Parameter(torch.ones(1))
    weight.grad = torch.ones(1)
    assert nonfinite.handle([], 3, [4], "stop", [weight], scaled) is None
    ranks["samples"] = [7, 8]
    said = nonfinite.handle([1], 3, [4], "skip", [weight], scaled)
    assert (
        said
        == "The loss or a gradient of step 3 is not finite on rank 1 (samples [7, 8]). The step is skipped on all ranks."
    )
    assert (weight.grad is None) == (not scaled)  # a GradScaler wants to see it
    with pytest.raises(FloatingPointError, match=r"step 3 is not finite on rank 1 \(samples \[7, 8\]\)"):
        nonfinite.handle([1], 3, [4], "stop", [weight], scaled)


@pytest.mark.parametrize(
    ("rank", "first", "error", "expected"),
    [
        (0, 1, PeerFailure("rank 1 failed"), ["failed", "waits"]),  # or rank 1 would wait for it
        (2, 1, PeerFailure("rank 1 failed"), ["waits"]),
        (0, 1, ValueError("another"), ["failed", "waits"]),
        (0, 0, ValueError("mine"), ["failed", "printed", "noted"]),
        (1, 1, ValueError("mine"), ["failed", "printed", "noted"]),
    ],
)
def test_no_rank_ends_before_the_error_is_printed(rank, first, error, expected, monkeypatch):
    """The launcher ends all others when one rank ends."""
    done = []

    def fail(report):
        done.append("failed")
        return first, report if first == rank else "ValueError: that of the first"

    channel = SimpleNamespace(
        fail=fail,
        wait_for_failure_of_main=lambda timeout_s: None,
        note_shown=lambda: done.append("noted"),
        wait_until_shown=lambda timeout_s: done.append("waits"),
    )
    monkeypatch.setattr(failures, "channel", lambda: channel)
    monkeypatch.setattr(failures, "topology", lambda: SimpleNamespace(rank=rank, world_size=3))
    monkeypatch.setattr(failures, "_end_process_soon", lambda: None)
    failures._make_hook(lambda *_: done.append("printed"))(type(error), error, None)
    assert done == expected

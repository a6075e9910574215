"""What ranks other than 0 print."""

import logging
import tracemalloc

import pytest

from accelerate_unsloth.reporting import verbosity

from ..launching import launch

MIB = 2**20


def test_what_a_muted_rank_prints_is_neither_shown_nor_kept(monkeypatch, capsys):
    monkeypatch.setattr(verbosity, "_muted", True)
    tracemalloc.start()
    with verbosity.muted_prints():
        before, _ = tracemalloc.get_traced_memory()
        for number in range(16):
            print(f"{number} 🦥" * (MIB // 8))
        after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after - before < MIB
    print("heard again")
    assert capsys.readouterr().out == "heard again\n"


def test_a_rank_that_is_not_muted_prints(monkeypatch, capsys):
    monkeypatch.setattr(verbosity, "_muted", False)
    with verbosity.muted_prints():
        print("heard")
    assert capsys.readouterr().out == "heard\n"


@pytest.mark.parametrize("name", verbosity._NOT_FOR_USERS)
def test_known_warnings_that_users_cannot_act_on_are_dropped_and_others_are_not(name, caplog):
    verbosity.drop_what_users_cannot_act_on()
    logger, text = logging.getLogger(name), verbosity._NOT_FOR_USERS[name]
    with caplog.at_level(logging.WARNING, logger=name):
        logger.warning(f"%s {text}: no module", "x")
        logger.warning("something else")
    assert [record.message for record in caplog.records] == ["something else"]


@pytest.mark.launch
def test_a_launch_shows_none_of_them(tiny_model, tmp_path):
    """Also when a library words or logs them in another way."""
    script = tmp_path / "script.py"
    script.write_text(
        f"from accelerate_unsloth import FastLanguageModel\nFastLanguageModel.from_pretrained({str(tiny_model)!r})\n"
    )
    finished = launch(script, processes=1, real_launcher=True)
    assert finished.status == 0, finished.output[-3000:]
    shown = [line for line in finished.output.splitlines() if "arning" in line or "Failed" in line or "pytree" in line]
    assert shown == []

"""What ranks other than 0 print."""

import tracemalloc

from accelerate_unsloth.reporting import verbosity

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

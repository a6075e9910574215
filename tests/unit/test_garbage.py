"""Collections during and after an import that creates many objects."""

import gc

import pytest

from accelerate_unsloth.engines.garbage import frozen_import


@pytest.fixture(autouse=True)
def as_before():
    """The state of this process's collector."""
    was_enabled = gc.isenabled()
    yield
    gc.unfreeze()
    (gc.enable if was_enabled else gc.disable)()


def test_nothing_is_collected_during_the_import_and_its_objects_are_left_out_afterwards():
    gc.unfreeze()
    collections = sum(generation["collections"] for generation in gc.get_stats())
    with frozen_import():
        kept = [[] for _ in range(100_000)]
        assert sum(generation["collections"] for generation in gc.get_stats()) == collections
    assert gc.isenabled()
    assert gc.get_freeze_count() >= len(kept)
    assert len(gc.get_objects()) < len(kept)


def test_a_failed_import_leaves_the_collector_as_it_was():
    gc.unfreeze()
    with pytest.raises(ImportError), frozen_import():
        raise ImportError
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_a_collector_that_the_script_switched_off_stays_off():
    gc.disable()
    with frozen_import():
        pass
    assert not gc.isenabled()

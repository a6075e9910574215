"""Options: defaults, environment, checks, and what of them reaches a real DDP module."""

import inspect
import subprocess
import sys
from dataclasses import fields, replace

import pytest

from accelerate_unsloth import UnslothPlugin

from ..launching import ROOT


def test_defaults():
    plugin = UnslothPlugin()
    assert (plugin.engine, plugin.micro_batch, plugin.bucket_cap_mb) == ("auto", "auto", 25)
    assert plugin.gradient_as_bucket_view is True
    assert plugin.find_unused_parameters is None
    assert plugin.monitor is plugin.report is True


def test_an_unset_field_is_read_from_the_environment_and_a_set_one_is_not(monkeypatch):
    monkeypatch.setenv("ACCELERATE_UNSLOTH_BUCKET_CAP_MB", "50")
    monkeypatch.setenv("ACCELERATE_UNSLOTH_STATIC_GRAPH", "yes")
    monkeypatch.setenv("ACCELERATE_UNSLOTH_FIND_UNUSED_PARAMETERS", "0")
    monkeypatch.setenv("ACCELERATE_UNSLOTH_REPORT", "0")
    plugin = UnslothPlugin(static_graph=False)
    assert (plugin.bucket_cap_mb, plugin.static_graph, plugin.find_unused_parameters) == (50, False, False)
    assert plugin.report is False


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("micro_batch", "fxied", "micro_batch='fxied' is not known.*Did you mean 'fixed'"),
        ("comm_hook", "int8", "choose one of no, fp16, bf16"),
        ("bucket_cap_mb", 0, "bucket_cap_mb=0 is not a whole number of at least 1"),
        ("static_graph", "maybe", "static_graph='maybe' is neither true nor false"),
    ],
)
def test_a_value_that_an_option_does_not_know_is_refused(option, value, message, monkeypatch):
    with pytest.raises(ValueError, match=message):
        UnslothPlugin(**{option: value})
    monkeypatch.setenv(f"ACCELERATE_UNSLOTH_{option.upper()}", str(value))
    with pytest.raises(ValueError, match=f"ACCELERATE_UNSLOTH_{option.upper()}="):
        UnslothPlugin()


def test_a_misspelt_variable_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_UNSLOTH_MICRO_BACH", "auto")
    with pytest.raises(ValueError, match="Did you mean ACCELERATE_UNSLOTH_MICRO_BATCH"):
        UnslothPlugin()


def test_help_shows_the_real_defaults_and_the_help_of_each_option():
    signature = inspect.signature(UnslothPlugin)
    for option in fields(UnslothPlugin):
        assert signature.parameters[option.name].default == option.metadata["default"]
        assert f"    {option.name} (`" in UnslothPlugin.__doc__
        assert option.metadata["help"].split()[-1] in UnslothPlugin.__doc__


def test_the_page_of_options_is_generated_from_their_metadata():
    made = subprocess.run(
        [sys.executable, "-c", "import make_options as m; print(m.page(), end='')"],
        cwd=ROOT / "docs",
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert (ROOT / "docs" / "options.md").read_text() == made, "run `python docs/make_options.py`"


@pytest.fixture
def one_gloo_process(tmp_path):
    import torch.distributed as dist
    from accelerate.state import AcceleratorState, GradientState, PartialState

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    for state in (AcceleratorState, PartialState, GradientState):
        state._shared_state.clear()
    dist.destroy_process_group()


def test_the_preset_reaches_a_real_ddp_module(one_gloo_process, monkeypatch):
    import torch
    from accelerate import Accelerator
    from accelerate.utils import DistributedType

    plugin = UnslothPlugin(bucket_cap_mb=7, static_graph=True, find_unused_parameters=True, comm_hook="bf16")
    accelerator = Accelerator(cpu=True, kwargs_handlers=plugin.kwargs_handlers())
    accelerator.state.distributed_type = DistributedType.MULTI_CPU  # one process alone would not be wrapped
    module = accelerator.prepare_model(torch.nn.Linear(2, 2))
    assert type(module) is torch.nn.parallel.DistributedDataParallel
    assert module.bucket_bytes_cap == 7 * 2**20
    assert module.gradient_as_bucket_view is True
    assert module.static_graph is True
    assert module.find_unused_parameters is True
    assert module.broadcast_buffers is False
    assert [hook.__name__ for hook, _ in module._comm_hooks] == ["bf16_compress_hook"]


def test_none_is_a_value_of_the_options_that_have_it_as_default(monkeypatch):
    monkeypatch.setenv("ACCELERATE_UNSLOTH_MICRO_BATCH_TOKENS", "4096")
    monkeypatch.setenv("ACCELERATE_UNSLOTH_MONITOR", "0")
    assert UnslothPlugin().micro_batch_tokens == 4096
    assert UnslothPlugin(micro_batch_tokens=None).micro_batch_tokens is None
    assert replace(UnslothPlugin(micro_batch_tokens=None), report=False).micro_batch_tokens is None
    assert UnslothPlugin(monitor=None).monitor is False  # which cannot be None

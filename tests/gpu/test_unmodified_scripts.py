"""Unsloth's scripts with one line in front of them, with Unsloth itself, on two GPUs or the one there is."""

import os

import pytest

from .. import tiny
from ..launching import WORKERS, launch
from ..test_unmodified_scripts import EXPLICIT, UNTOUCHED, losses, rewritten
from .conftest import count_gpus

pytestmark = [pytest.mark.gpu, pytest.mark.launch]

BF16_ROUNDING = 1e-2


def test_scripts_with_one_line_in_front_give_the_losses_of_the_explicit_imports(real_model, tmp_path):
    data = tiny.make_data(tmp_path / "uneven.jsonl", samples=48)
    imports = {old: new for old, new in EXPLICIT.items() if "import" in old}
    scripts = {
        "explicit": rewritten("unsloth_recent.py", UNTOUCHED, imports, tmp_path),
        "recent": WORKERS / "unsloth_recent.py",
        "notebook": WORKERS / "unsloth_notebook.py",
    }
    found = {}
    for name, script in scripts.items():
        out = tmp_path / name
        environment = {
            "CUDA_VISIBLE_DEVICES": os.environ.get("GPUS", "0,1"),
            "UNSLOTH_COMPILE_LOCATION": str(out / "compiled"),
            "HF_HOME": str(out / "cache"),
        }
        arguments = [real_model, data, out]
        processes = min(2, count_gpus())
        finished = launch(script, arguments, processes, environment, timeout_s=400, config="unsloth_ddp")
        assert finished.status == 0, finished.output[-6000:]
        found[name] = losses(out)
    assert found["recent"] == pytest.approx(found["explicit"], rel=BF16_ROUNDING)
    assert found["notebook"] == pytest.approx(found["explicit"], rel=BF16_ROUNDING)


def test_every_loader_of_unsloth_is_replaced_and_put_back(tmp_path):
    script = tmp_path / "names.py"
    script.write_text(
        "import accelerate_unsloth\n"
        "with accelerate_unsloth.enable_multi_gpu():\n"
        "    import unsloth\n"
        "    names = ['FastLanguageModel', 'FastModel', 'FastVisionModel', 'FastTextModel']\n"
        "    inside = [getattr(unsloth, name) for name in names]\n"
        "outside = [getattr(unsloth, name) for name in names]\n"
        "print('replaced', [issubclass(a, b) and a is not b for a, b in zip(inside, outside, strict=True)])\n"
    )
    environment = {
        "CUDA_VISIBLE_DEVICES": os.environ.get("GPUS", "0"),
        "UNSLOTH_COMPILE_LOCATION": str(tmp_path / "compiled"),
    }
    finished = launch(script, [], 1, environment, config="unsloth_ddp")
    assert finished.status == 0, finished.output[-6000:]
    assert "replaced [True, True, True, True]" in finished.output

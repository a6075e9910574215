"""Real notebooks in fresh kernels: `accelerate.notebook_launcher` on the CPU, and what is said where it cannot work."""

import json
from types import SimpleNamespace

import nbformat
import pytest
from nbclient import NotebookClient
from safetensors.torch import load_file

from ..launching import ROOT, clean_environment
from ..workers.by_fork import free_port

pytestmark = pytest.mark.launch

EXAMPLE = ROOT / "examples" / "kaggle_2x_t4.ipynb"
LAUNCH = "from accelerate import notebook_launcher\n\nnotebook_launcher(train, num_processes=2)"
LOOKED = "import accelerate_unsloth\naccelerate_unsloth.get_multi_gpu_status()['world_size']"
PLAIN = """
def train():
    from accelerate_unsloth import FastLanguageModel
    from accelerate import Accelerator
    print(f"{Accelerator().num_processes} together\\n", end="")
"""
# What a machine with two GPUs says, after a cell that has looked for them.
TWO_GPUS = """
import torch
torch.accelerator.is_available = lambda: True
torch.cuda.device_count = lambda: 2
torch.cuda._is_in_bad_fork = lambda: True
"""


def execute(sources: list[str], folder) -> list[SimpleNamespace]:
    """Run cells in a fresh kernel; return the text of each, and its error or an empty text."""
    assert sum(LAUNCH in source for source in sources) >= 1
    port = f"notebook_launcher(train, num_processes=2, use_port='{free_port()}'"  # 29500 may be taken here
    cells = [source.replace("notebook_launcher(train, num_processes=2", port) for source in sources]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    place = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=120, kernel_name="python3", allow_errors=True, resources=place)
    client.execute(env=clean_environment({"HF_HOME": str(folder / "cache")}))
    return [read(cell.outputs) for cell in notebook.cells]


def read(outputs) -> SimpleNamespace:
    texts, error = [], ""
    for output in outputs:
        if output.output_type == "error":
            error = f"{output.ename}: {output.evalue}"
        else:
            texts.append(output.get("text") or output.data.get("text/plain", ""))
    return SimpleNamespace(text="".join(texts), error=error)


@pytest.fixture(scope="module")
def kaggle(tiny_model, tmp_path_factory):
    """The outputs of the example by the names of its cells, with other settings; `again` launches once more at the end."""
    folder = tmp_path_factory.mktemp("kaggle")
    (folder / "data").mkdir()
    row = {"instruction": "Say it.", "input": "", "output": "one model learns from every token"}
    (folder / "data" / "rows.jsonl").write_text((json.dumps(row) + "\n") * 40)
    cells = {cell.id: cell for cell in nbformat.read(EXAMPLE, as_version=4).cells if cell.cell_type == "code"}
    settings = f"MODEL, DATASET, LOAD_IN_4BIT, STEPS, OUT = {str(tiny_model)!r}, 'data', False, 2, 'outputs'"
    named = {id: settings if id == "settings" else cell.source for id, cell in cells.items() if id != "install"}
    named = {"looked": LOOKED, "plain": f"{PLAIN}\n{LAUNCH}", **named, "again": LAUNCH}
    done = dict(zip(named, execute(list(named.values()), folder), strict=True))
    return SimpleNamespace(folder=folder, **done)


def test_a_look_at_the_package_does_not_make_each_process_a_launch_of_its_own(kaggle):
    assert kaggle.looked.text == "1"
    assert kaggle.plain.error == ""
    assert kaggle.plain.text.count("2 together") == 2


def test_the_example_for_kaggle_trains_on_two_processes(kaggle):
    assert kaggle.launch.error == ""
    assert kaggle.launch.text.count("per device 2 x accumulation 4 x processes 2") == 1
    weights = load_file(kaggle.folder / "outputs" / "adapter_model.safetensors")
    assert any(weight.any() for name, weight in weights.items() if "lora_B" in name)  # zero before training


def test_the_example_for_kaggle_answers_with_the_adapter(kaggle):
    assert getattr(kaggle, "try").error == ""
    assert "Name three planets." in getattr(kaggle, "try").text


def test_a_kernel_with_the_engine_gets_one_error_with_the_fix(kaggle):
    assert kaggle.again.error.startswith("RuntimeError: notebook_launcher was called in a kernel in which")
    assert "Restart the kernel" in kaggle.again.error
    assert "Launching training" not in kaggle.again.text  # nothing was started


def test_a_kernel_with_cuda_gets_one_error_with_the_fix(tmp_path):
    train = "def train():\n    from accelerate_unsloth import FastLanguageModel\n    print('not reached')"
    *_, launch = execute([TWO_GPUS, train, LAUNCH], tmp_path)
    assert launch.error.count("RuntimeError: A cell of this notebook started CUDA") == 1
    assert "Restart the kernel" in launch.error
    assert "not reached" not in launch.text

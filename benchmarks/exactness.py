"""
The same fine-tune on 1, 2 and 4 processes: how far apart losses and weights end up.

Every launch trains the demo's model on the demo's data with an effective batch of 8 samples, cut differently, and is
compared with the one of a single process. Needs `make demo` to have run once. On a machine with GPUs it uses as many
of the launches as there are GPUs for.

    python benchmarks/exactness.py --steps 6 --out benchmarks/exactness.json
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from accelerate_unsloth.launch import configs

EFFECTIVE_BATCH = 8
PROCESSES = (1, 2, 4)


def train(processes: int, steps: int, gpus: int, out: Path) -> dict:
    """One launch: its losses by step, and its adapter weights."""
    config = "unsloth_single_gpu" if processes == 1 else ("unsloth_ddp" if gpus else "unsloth_ddp_cpu")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(configs.path(config))]
    command += ["--num_processes", str(processes), "examples/train.py", "--config", "examples/demo/train.yaml"]
    options = {
        "output_dir": out,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": EFFECTIVE_BATCH // processes,
        "max_steps": steps,
        "save_strategy": "steps",
        "save_steps": steps,
        "eval_samples": 0,
    }
    options |= {} if gpus else {"use_cpu": True, "bf16": False}
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    subprocess.run(command, check=True)
    history = json.loads((out / f"checkpoint-{steps}" / "trainer_state.json").read_text())["log_history"]
    return {
        "losses": [entry["loss"] for entry in history if "loss" in entry],
        "weights": load_file(out / "adapter_model.safetensors"),
    }


def compare(reference: dict, run: dict) -> tuple[float, float]:
    """Largest relative difference of a loss, and of a weight tensor by its norm."""
    losses = zip(reference["losses"], run["losses"], strict=True)
    loss = max(abs(a - b) / abs(a) for a, b in losses)
    pairs = [(reference["weights"][name].float(), run["weights"][name].float()) for name in reference["weights"]]
    norms = [(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(a)).item() for a, b in pairs]
    return loss, max(norms)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    gpus = torch.cuda.device_count()
    processes = [n for n in PROCESSES if not gpus or n <= gpus]
    with tempfile.TemporaryDirectory() as folder:
        runs = {n: train(n, arguments.steps, gpus, Path(folder) / str(n)) for n in processes}
    rows = []
    table = Table(title=f"effective batch {EFFECTIVE_BATCH}, {arguments.steps} steps")
    for heading in (
        "processes x accumulation",
        "loss of the last step",
        "largest loss difference",
        "of a weight tensor",
    ):
        table.add_column(heading)
    for n, run in runs.items():
        loss, weight = compare(runs[1], run)
        rows.append({"processes": n, "losses": run["losses"], "loss_difference": loss, "weight_difference": weight})
        table.add_row(f"{n} x {EFFECTIVE_BATCH // n}", f"{run['losses'][-1]:.6f}", f"{loss:.1e}", f"{weight:.1e}")
    Console().print(table)
    if arguments.out:
        libraries = ("unsloth", "trl", "transformers", "accelerate", "peft", "torch")
        report = {
            "command": " ".join(["python", *sys.argv]),
            "hardware": torch.cuda.get_device_name() if gpus else f"{platform.machine()} CPU",
            "versions": {name: version(name) for name in libraries},
            "runs": rows,
        }
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()

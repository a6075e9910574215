"""Let Unsloth generate code as on a GPU machine, before and after there is a process group; say where it was put."""

import hashlib
import json
import os
import sys
from pathlib import Path

from accelerate_unsloth.engines import variables
from accelerate_unsloth.launch.topology import topology

variables.set_defaults(topology().node)
os.environ["UNSLOTH_ALLOW_CPU"] = "1"
import unsloth  # noqa: E402, F401

del os.environ["UNSLOTH_ALLOW_CPU"]
# isort: split
import torch.distributed  # noqa: E402
import trl  # noqa: E402
from unsloth.models import rl  # noqa: E402


def generated(trainer: str) -> dict:
    """Where the code of a trainer of TRL's came from, after Unsloth has rewritten it."""
    module = sys.modules[getattr(trl, trainer).__module__]
    file = Path(module.__file__).resolve()
    return {"module": module.__name__, "file": str(file), "digest": hashlib.sha256(file.read_bytes()).hexdigest()}


def main(out: str) -> None:
    out = Path(out)
    rl._patch_trl_rl_trainers("sft_trainer")
    report = {"before": generated("SFTTrainer")}
    torch.distributed.init_process_group("gloo")
    rl._patch_trl_rl_trainers("dpo_trainer")
    report["after"] = generated("DPOTrainer")
    (out / f"result{topology().rank}.json").write_text(json.dumps(report))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])

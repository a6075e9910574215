"""Checkpoints of a custom training loop: trained weights, optimizer, schedule, RNG states, and the position in the epoch."""

import functools
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from ..launch.channel import channel
from ..launch.topology import topology
from ..policies.aggregation import AggregationMethod
from ..reliability import checkpoints, rank0_writes
from ..reliability.checksum import kept_buffers

_WEIGHTS, _OPTIMIZER, _STATE, _ORDER = "trained.safetensors", "optimizer.pt", "trainer_state.json", "order.json"
_POSITION = ("epoch", "step_in_epoch", "global_step", "num_tokens", "epoch_facts")


def save(trainer, folder: Path) -> Path:
    """
    Write a checkpoint of a [`MultiGPUTrainer`]; all ranks call it together.

    Raises:
        OSError: if it cannot be written, a file of it is lost, or the folder holds something else. What was there stays.
    """
    # A staging folder for this checkpoint alone: another training may be writing its own next to it.
    root = folder.parent / f"{checkpoints.STAGING}-{folder.name}"
    written = root / folder.name
    shares_disk = checkpoints.prepare_staging(root)
    written.mkdir(exist_ok=True)
    torch.save(rng_states(), written / _rng_file())
    required = checkpoints.gather_required([_rng_file()], shares_disk)
    rank0_writes.write_once("checkpoint", functools.partial(_publish, trainer, written, folder, required))
    return folder


def _publish(trainer, written: Path, folder: Path, required: list[str]) -> None:
    if not checkpoints.may_replace(folder):
        raise FileExistsError(f"{folder} holds files that are no checkpoint. Name a folder that is new or empty.")
    save_file(_trained(trainer.model), written / _WEIGHTS)
    torch.save({name: part.state_dict() for name, part in stateful_parts(trainer).items()}, written / _OPTIMIZER)
    position = {name: getattr(trainer, name) for name in _POSITION}
    (written / _STATE).write_text(json.dumps(_described(trainer) | position, indent=1))
    required = [*required, _WEIGHTS, _OPTIMIZER, _STATE]
    if trainer.step_in_epoch and trainer.epoch_order is not None:
        (written / _ORDER).write_text(json.dumps(trainer.epoch_order))
        required.append(_ORDER)
    rank0_writes.follow_umask(written)
    checkpoints.publish(written, folder, required)
    shutil.rmtree(written.parent, ignore_errors=True)


def load(trainer, folder: Path) -> None:
    """
    Continue from what [`save`] wrote; all ranks call it together.

    Raises:
        ValueError: if the checkpoint is damaged, or from another training.
    """
    damage = _damage_on_any_machine(folder)
    if damage is not None:
        raise ValueError(f"{folder} is not a complete checkpoint: {damage}. Name another one.")
    state = json.loads((folder / _STATE).read_text())
    described = _described(trainer)
    differ = changed({name: state.get(name) for name in described}, described)
    if differ:
        raise ValueError(f"{folder} is of another training: {'; '.join(differ)}. Set them as they were.")
    _restore_weights(trainer.model, load_file(folder / _WEIGHTS))
    states = torch.load(folder / _OPTIMIZER, map_location="cpu", weights_only=True)
    for name, part in stateful_parts(trainer).items():
        part.load_state_dict(states[name])
    for name in _POSITION:
        setattr(trainer, name, state[name])
    order = folder / _ORDER
    trainer.epoch_order = json.loads(order.read_text()) if order.exists() else None
    # The manifest names the files of all ranks that saved to this disk. Of more ranks than that, the RNG states are not known.
    if (folder / _rng_file()).exists():
        restore_rng_states(torch.load(folder / _rng_file(), weights_only=True))


def _rng_file() -> str:
    return f"random_rank{topology().rank}.pt"


def _damage_on_any_machine(folder: Path) -> str | None:
    """Let one process of each machine read the files, and return the same on all ranks."""
    here = channel().run_on_local_main("damage", functools.partial(checkpoints.damage, folder))
    for rank, damage in enumerate(channel().gather("damage", here)):
        if damage is not None:
            return f"{damage} (on the machine of rank {rank})" if rank else damage
    return None


def changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return a text for each value that is not as it was."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return [f"{name}={before.get(name)!r}, now {now.get(name)!r}" for name in names]


def _described(trainer) -> dict[str, Any]:
    """Return what must be as it was when a training continues."""
    trained = sorted((name, list(tensor.shape)) for name, tensor in _trained(trainer.model).items())
    described = {
        "aggregation_method": trainer.aggregation.method.value,
        "seed": trainer.seed,
        "optimizer, scheduler and scaler": sorted(stateful_parts(trainer)),
        "trained tensors": json.loads(json.dumps(trained)),
    }
    # TOKEN_MEAN is the only method that does not depend on how a step is split.
    if trainer.aggregation.method is not AggregationMethod.TOKEN_MEAN:
        described["micro-batches of a step"] = trainer.gradient_accumulation_steps * topology().world_size
    return described


def stateful_parts(trainer) -> dict[str, Any]:
    """Return what changes with each step, apart from the weights."""
    parts = {"optimizer": trainer.optimizer, "scheduler": trainer.scheduler, "scaler": trainer.accelerator.scaler}
    return {name: part for name, part in parts.items() if part is not None}


def _trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return what training changes: trainable parameters, and buffers that a model keeps."""
    tensors = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {name: tensor.detach().contiguous() for name, tensor in (tensors | kept_buffers(model)).items()}


@torch.no_grad()
def _restore_weights(model: torch.nn.Module, saved: dict[str, torch.Tensor]) -> None:
    for name, tensor in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
        if name in saved:
            tensor.copy_(saved[name])


def rng_states() -> dict[str, Any]:
    """Return the states of all random number generators, in types that are loaded without unpickling code."""
    name, keys, *rest = np.random.get_state()
    states = {"python": random.getstate(), "numpy": [name, keys.tolist(), *rest], "torch": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def restore_rng_states(states: dict[str, Any]) -> None:
    """Set all random number generators to what [`rng_states`] returned."""
    version, keys, gauss = states["python"]
    random.setstate((version, tuple(keys), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])

"""What a custom loop saves and resumes from: trained weights, optimizer, schedule, RNG states, and its place in the epoch."""

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
from ..policies.aggregation import AggregationMethod
from ..reliability import checkpoints, rank0_writes, staging
from ..reliability.checksum import kept_buffers

_WEIGHTS, _MOVING, _STATE = "trained.safetensors", "optimizer.pt", "trainer_state.json"
_POSITION = ("epoch", "step_in_epoch", "global_step", "num_tokens", "epoch_facts")
_ORDER, _RANDOM_STATES = "order.json", "random_rank{rank}.pt"


def save(trainer, folder: Path) -> Path:
    """
    Write a checkpoint; all ranks come here together.

    Args:
        trainer ([`MultiGPUTrainer`]): Set up.
        folder (`Path`): Its place.

    Raises:
        OSError: if it cannot be written, a file of it is lost, or the folder holds something else; what was there is as it was.
    """
    # A folder for this checkpoint alone: another training may be writing its own beside it.
    root = folder.parent / f"{checkpoints.STAGING}-{folder.name}"
    written, random_states = root / folder.name, _RANDOM_STATES.format(rank=trainer.place.rank)
    shares_disk = staging.prepare(root)
    written.mkdir(exist_ok=True)
    torch.save(_random_states(), written / random_states)
    required = staging.gather_required([random_states], shares_disk)
    rank0_writes.write_once("checkpoint", functools.partial(_publish, trainer, written, folder, required))
    return folder


def _publish(trainer, written: Path, folder: Path, required: list[str]) -> None:
    if not checkpoints.may_replace(folder):
        raise FileExistsError(f"{folder} holds files that are no checkpoint. Name a folder that is new or empty.")
    save_file(_trained(trainer.model), written / _WEIGHTS)
    torch.save({name: part.state_dict() for name, part in _moving(trainer).items()}, written / _MOVING)
    (written / _STATE).write_text(json.dumps(_described(trainer) | _position(trainer), indent=1))
    required = [*required, _WEIGHTS, _MOVING, _STATE]
    if trainer.step_in_epoch and trainer.epoch_order is not None:
        (written / _ORDER).write_text(json.dumps(trainer.epoch_order))
        required.append(_ORDER)
    rank0_writes.follow_umask(written)
    checkpoints.publish(written, folder, required)
    shutil.rmtree(written.parent, ignore_errors=True)


def load(trainer, folder: Path) -> None:
    """
    Go on from a checkpoint; all ranks come here together.

    Raises:
        ValueError: if it is damaged, or of another training.
    """
    wrong = _damage_on_any_machine(folder)
    if wrong is not None:
        raise ValueError(f"{folder} is not a complete checkpoint: {wrong}. Name another one.")
    state = json.loads((folder / _STATE).read_text())
    described = _described(trainer)
    differ = changed({name: state.get(name) for name in described}, described)
    if differ:
        raise ValueError(f"{folder} is of another training: {'; '.join(differ)}. Set them as they were.")
    _restore_weights(trainer.model, load_file(folder / _WEIGHTS))
    moved = torch.load(folder / _MOVING, map_location="cpu", weights_only=True)
    for name, part in _moving(trainer).items():
        part.load_state_dict(moved[name])
    for name in _POSITION:
        setattr(trainer, name, state[name])
    order = folder / _ORDER
    trainer.epoch_order = json.loads(order.read_text()) if order.exists() else None
    random_states = folder / _RANDOM_STATES.format(rank=trainer.place.rank)
    # The manifest names those of all ranks that saved to this disk, so none of them is lost. A rank beyond begins with its own.
    if random_states.exists():
        _restore_random_states(torch.load(random_states, weights_only=True))


def _damage_on_any_machine(folder: Path) -> str | None:
    """Let one process of each machine read the files, and return the same on all ranks."""
    here = channel().run_on_local_main("damage", functools.partial(checkpoints.damage, folder))
    for rank, wrong in enumerate(channel().gather("damage", here)):
        if wrong is not None:
            return f"{wrong} (on the machine of rank {rank})" if rank else wrong
    return None


def changed(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """In words, what is not as it was."""
    names = [name for name in {**was, **now} if was.get(name) != now.get(name)]
    return [f"{name}={was.get(name)!r}, now {now.get(name)!r}" for name in names]


def _described(trainer) -> dict[str, Any]:
    """What has to be as it was."""
    trained = sorted((name, list(tensor.shape)) for name, tensor in _trained(trainer.model).items())
    described = {
        "aggregation_method": trainer.aggregation.method.value,
        "seed": trainer.seed,
        "optimizer, scheduler and scaler": sorted(_moving(trainer)),
        "trained tensors": json.loads(json.dumps(trained)),
    }
    # The only method that does not ask how a step is cut.
    if trainer.aggregation.method is not AggregationMethod.TOKEN_MEAN:
        described["micro-batches of a step"] = trainer.gradient_accumulation_steps * trainer.place.world_size
    return described


def _position(trainer) -> dict[str, Any]:
    return {name: getattr(trainer, name) for name in _POSITION}


def _moving(trainer) -> dict[str, Any]:
    """What moves on with the steps, beside the weights."""
    parts = {"optimizer": trainer.optimizer, "scheduler": trainer.scheduler, "scaler": trainer.accelerator.scaler}
    return {name: part for name, part in parts.items() if part is not None}


def _trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What training changes: trainable parameters, and buffers that a model keeps. Frozen weights are the model's own."""
    tensors = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {name: tensor.detach().contiguous() for name, tensor in (tensors | kept_buffers(model)).items()}


@torch.no_grad()
def _restore_weights(model: torch.nn.Module, saved: dict[str, torch.Tensor]) -> None:
    for name, tensor in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
        if name in saved:
            tensor.copy_(saved[name])


def _random_states() -> dict[str, Any]:
    """Return the states of the generators that a forward may use, in types that are loaded without unpickling code."""
    name, keys, *rest = np.random.get_state()
    states = {"python": random.getstate(), "numpy": [name, keys.tolist(), *rest], "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_random_states(states: dict[str, Any]) -> None:
    version, keys, gauss = states["python"]
    random.setstate((version, tuple(keys), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])

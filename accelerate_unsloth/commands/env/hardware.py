"""The visible GPUs and the links between them."""

from collections.abc import Sequence

from ...devices.manager import Device
from .finding import NOTE, OK, Finding

_OLDEST_FOR_UNSLOTH = (7, 0)
_IDLE_SHARE_FREE = 0.9  # an idle GPU has at least this share of its memory free


def findings(devices: Sequence[Device], notes: Sequence[str], driver: str | None) -> list[Finding]:
    """
    A line for the driver, each GPU, each note of the [`DeviceManager`], and the links.

    Args:
        devices (`Sequence[Device]`): The visible GPUs.
        notes (`Sequence[str]`): What the manager has to say beside them.
        driver (`str`, *optional*): The driver's version.
    """
    found = [Finding("driver", driver)] if driver else []
    found += [Finding("GPUs", note, NOTE) for note in notes]
    found += [_describe(device) for device in devices]
    return found + ([_links(devices)] if len(devices) > 1 else [])


def _describe(device: Device) -> Finding:
    major, minor = device.compute_capability
    value = (
        f"{device.name}, {device.free_gib:.1f} of {device.total_gib:.1f} GiB free, compute capability {major}.{minor}"
    )
    subject = f"GPU {device.index}"
    if device.compute_capability < _OLDEST_FOR_UNSLOTH:
        return Finding(subject, value, NOTE, "Unsloth needs 7.0 or newer; leave this GPU out of CUDA_VISIBLE_DEVICES.")
    if device.free_gib < _IDLE_SHARE_FREE * device.total_gib:
        holders = f"{len(device.processes)} process(es) compute on it" if device.processes else "its memory is in use"
        return Finding(
            subject, value, NOTE, f"{holders}: see `nvidia-smi`, or choose others with DeviceManager.select."
        )
    if not device.bf16:
        return Finding(subject, f"{value}, no bfloat16", NOTE, "Train with fp16=True, bf16=False.")
    return Finding(subject, value, OK)


def _links(devices: Sequence[Device]) -> Finding:
    pairs = {}
    for device in devices:
        for other, link in device.links.items():
            if other > device.index:
                pairs.setdefault(link, []).append(f"{device.index}-{other}")
    value = "; ".join(f"{link}: {_shorten(among)}" for link, among in pairs.items())
    return Finding("links", value, OK)


def _shorten(pairs: list[str]) -> str:
    return ", ".join(pairs) if len(pairs) <= 6 else f"{len(pairs)} pairs"

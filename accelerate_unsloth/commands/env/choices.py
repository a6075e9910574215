"""Which engine, attention kernel and step plan would be chosen here, for a usual model."""

import os
from collections.abc import Iterator, Sequence

from ... import engines
from ...devices.manager import Device
from ...engines.kernels import describe
from ...launch.topology import Topology, uses_cpu
from ...plugin import UnslothPlugin
from ...policies import attention
from .checks import NOTE, PROBLEM, Finding

# The choices depend on the model and the data, which are not known here.
_MODEL, _LENGTHS = "8B", 1000


def check_choices(
    visible_gpus: int, devices: Sequence[Device] = (), kernels: dict | None = None
) -> tuple[str | None, list[Finding]]:
    """
    Decide as training would, with the options of this environment, on GPUs that torch can use.

    `devices` are for their memory; `kernels` is what [`kernels.describe`] returned where Unsloth was imported. Return the
    engine, `None` if the options do not allow one, and the findings.
    """
    try:
        plugin = UnslothPlugin()
        engine = engines.resolve(plugin.engine, visible_gpus, uses_cpu())
    except ValueError as error:
        return None, [Finding("options", str(error), PROBLEM)]
    findings = [Finding("engine", f"{engine.name}: {engine.reason}")]
    kernels = describe(engine.name) if engine.name == "reference" else kernels
    if kernels:  # else Unsloth could not be imported, which is another finding
        findings.append(_check_attention(plugin.attention, attention.Facts(lengths=_LENGTHS, **kernels)))
    if devices and engine.name == "unsloth":
        processes = Topology.from_environment().world_size if "WORLD_SIZE" in os.environ else visible_gpus
        findings += _check_plan(min(device.total_gib for device in devices), processes)
    else:
        findings.append(Finding("step plan", "as the script says: memory is planned on GPUs only"))
    return engine.name, findings


def _check_attention(requested: str, facts: attention.Facts) -> Finding:
    try:
        choice = attention.resolve(requested, facts)
    except ValueError as error:
        return Finding("attention", str(error), PROBLEM)
    return Finding("attention", f"samples of {facts.lengths:,} different lengths: {choice.backend}: {choice.reason}")


def _check_plan(gpu_gib: float, processes: int) -> Iterator[Finding]:
    from ...config_manager import ConfigManager

    try:
        config = ConfigManager().get_optimal_config(_MODEL, gpu_gib, processes)
    except ValueError as error:
        yield Finding("step plan", str(error), NOTE)
        return
    yield Finding("step plan", f"for {config.assumptions['model']}; {config.assumptions['script']}")
    yield Finding("activations", config.assumptions["activations"])
    yield Finding("micro-batches", config.assumptions["micro-batches"])

"""Which engine and which gradient synchronisation would be chosen here, and why: asked of the library itself."""

import os
from dataclasses import dataclass

from .. import engines
from ..plugin import UnslothPlugin
from ..policies import gradient_sync
from ..topology import Topology, uses_cpu
from .finding import PROBLEM, Finding

# What the choice depends on is the model, which is not known here: these two stand for the usual cases.
_EXAMPLES = {
    "LoRA on 8 B parameters": {"trainable": 42_000_000, "total": 8_000_000_000},
    "8 B parameters, all trained": {"trainable": 8_000_000_000, "total": 8_000_000_000},
}


@dataclass(frozen=True)
class Choices:
    engine: str | None  # None if it cannot be chosen
    findings: tuple[Finding, ...]


def findings(visible_gpus: int) -> Choices:
    """
    Resolve what the library would, with the options of this environment.

    Args:
        visible_gpus (`int`): GPUs that torch can use.
    """
    use_cpu = uses_cpu()
    try:
        plugin = UnslothPlugin()
        engine = engines.resolve(plugin.engine, 0 if use_cpu else visible_gpus, use_cpu)
    except ValueError as error:
        return Choices(None, (Finding("options", str(error), PROBLEM),))
    found = [Finding("engine", f"{engine.name}: {engine.reason}")]
    processes = Topology.from_environment().world_size if "WORLD_SIZE" in os.environ else max(visible_gpus, 1)
    for name, size in _EXAMPLES.items():
        sync = gradient_sync.resolve(plugin.gradient_sync, processes, loss_takes_item_count=True, **size)
        found.append(Finding("gradient sync", f"{name}, {processes} process(es): {sync.mode}: {sync.reason}"))
    return Choices(engine.name, tuple(found))

"""
Measure speed and memory of all ranks, for each logging step.

A rank adds up its work since the last logging step, without waiting for its GPU. Ranks exchange these sums only where
they log, in one small collective.
"""

import time
from dataclasses import fields

import psutil
import torch
from accelerate.utils import gather
from transformers import TrainerCallback

from ..launch.channel import channel
from ..launch.topology import topology
from .readings import Interval, RankReading

_GIB = 2**30
_NUMBERS = {field.name: field.type for field in fields(RankReading) if field.name != "device"}


class Monitor(TrainerCallback):
    """
    Time this rank's steps on its `device`. All ranks build one together.

    `history` holds the readings of all ranks since training began, on rank 0 only.
    """

    def __init__(self, device: torch.device):
        self.history: list[Interval] = []
        self._device, self._cuda = device, device.type == "cuda"
        own_name = torch.cuda.get_device_name(device) if self._cuda else "CPU"
        self._device_names = channel().gather("devices", own_name)
        self._since_log = RankReading()
        self._retries_before = 0
        self._step_began_s = self._own_began = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.history, self._since_log = [], RankReading()
        self._retries_before = self._count_retries()  # the probe of the micro-batches may have run full on purpose

    def begin_step(self) -> None:
        """Begin a step, before its batches are fetched."""
        self._step_began_s = time.perf_counter()

    def begin_work(self) -> None:
        """Begin the work of a step, before its first forward."""
        if self._own_began is None:
            self._own_began = self._now()

    def end_work(self, tokens: int) -> "_Moment":
        """Count `tokens` and return the time after the last backward of a step, before the reduction."""
        self._since_log.tokens += tokens
        return self._now()

    def add_work(self, ended: "_Moment") -> None:
        """Add the time until `ended`, after the reduction, when the GPU has passed `ended` anyway."""
        if self._own_began is not None:
            self._since_log.own_s += ended.since(self._own_began)
        self._own_began = None

    def on_step_end(self, args, state, control, **kwargs):
        if self._step_began_s is not None:
            self._since_log.wall_s += time.perf_counter() - self._step_began_s
            self._since_log.steps += 1

    @property
    def unlogged_s(self) -> float:
        """The seconds of this rank's steps since the last logging step."""
        return self._since_log.wall_s

    def read(self, step: int) -> list[RankReading]:
        """
        Return what every rank did since the last call, in rank order; all ranks call this together.

        `step` is the number of optimizer steps that are done.
        """
        reading, self._since_log = self._since_log, RankReading()
        self._add_memory(reading)
        ranks = self._exchange(reading)
        if topology().is_main:
            self.history.append(Interval(step, ranks))
        return ranks

    def _exchange(self, reading: RankReading) -> list[RankReading]:
        """Return the readings of all ranks, in rank order."""
        rows = [[getattr(reading, name) for name in _NUMBERS]]
        if topology().world_size > 1:  # float64 holds every count that can occur
            rows = gather(torch.tensor(rows, dtype=torch.float64, device=self._device)).tolist()
        return [
            RankReading(
                device=device, **{name: _NUMBERS[name](value) for name, value in zip(_NUMBERS, row, strict=True)}
            )
            for device, row in zip(self._device_names, rows, strict=True)
        ]

    def _add_memory(self, reading: RankReading) -> None:
        host = psutil.virtual_memory()
        reading.host_gib = psutil.Process().memory_info().rss / _GIB
        reading.host_available_gib, reading.host_total_gib = host.available / _GIB, host.total / _GIB
        if not self._cuda:
            return
        reading.peak_gib = torch.cuda.max_memory_allocated() / _GIB
        reading.reserved_gib = torch.cuda.max_memory_reserved() / _GIB
        reading.reachable_gib = (torch.cuda.memory_reserved() + torch.cuda.mem_get_info()[0]) / _GIB
        retries = self._count_retries()
        reading.alloc_retries, self._retries_before = retries - self._retries_before, retries

    def _count_retries(self) -> int:
        return torch.cuda.memory_stats().get("num_alloc_retries", 0) if self._cuda else 0

    def _now(self) -> "_Moment":
        return _Moment(self._cuda)


class _Moment:
    """A point in time of the GPU's queue, which is not waited for, or of the CPU."""

    def __init__(self, cuda: bool):
        self._s, self._event = time.perf_counter(), None
        if cuda:
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()

    def since(self, earlier: "_Moment") -> float:
        if self._event is None:
            return self._s - earlier._s
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event) / 1000

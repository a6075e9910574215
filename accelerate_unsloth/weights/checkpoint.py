"""
Reads a checkpoint layer by layer, through the function of transformers that reads all of it.

The function takes a dictionary of tensors that are not read yet. Called with those of one layer it renames, converts and
quantizes them as always, and reads nothing else.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from ..patches import patched
from .decoder import DecoderLayer


class LayeredCheckpoint:
    """
    The tensors of a checkpoint, by the decoder layer that they become parameters of.

    Args:
        load (`Callable`): `convert_and_load_state_dict_in_model` of transformers (5.17).
        model ([`~transformers.PreTrainedModel`]): On the meta device.
        load_config: That of transformers.
        layers (`list[DecoderLayer]`): Of the model.
        state_dict (`dict[str, Any]`): Of the checkpoint.

    Attributes:
        info: What transformers reports of all that was read, by this rank or, after [`add_report`], by others.
    """

    def __init__(self, load: Callable, model, load_config, layers: list[DecoderLayer], state_dict: dict[str, Any]):
        self._load, self._model, self._layers = load, model, layers
        self._config = load_config
        # Layers go to the host at once. Only a GPU quantizes to the bits of a GPU, and fast enough.
        quantizes = load_config.hf_quantizer is not None and not load_config.hf_quantizer.pre_quantized
        self._layer_config = load_config if quantizes else replace(load_config, device_map={"": "cpu"})
        self._groups = _by_layer(model, load_config.weight_mapping or [], layers, state_dict)
        self.info = None

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Read what is outside of the layers, on entry; [`read_layer`] may be called in the body."""
        names = self._model.state_dict()
        # Every call has to see the model as it was before the first, and to read one tensor at a time: glibc keeps up to 64 MiB
        # of each thread that has converted some (2.36, `malloc_trim`).
        unchanged = patched(self._model, state_dict=lambda *args, **kwargs: names)
        with unchanged, patched(os.environ, HF_DEACTIVATE_ASYNC_LOAD="1"):
            self.info = self._read(None, self._config)
            yield

    def read_layer(self, index: int) -> list[str]:
        """Read a layer, and return the names of the parameters that it has values for."""
        with _without_progress_bars():
            info = self._read(index, self._layer_config)
        self.info.missing_keys &= info.missing_keys
        self.add_report(_report(info))
        left = info.missing_keys | {name for name, *_ in info.mismatched_keys}
        return [name for name in self._layers[index].parameters if name not in left]

    def _read(self, group: int | None, load_config) -> Any:
        return self._load(self._model, self._groups.get(group, {}), load_config)[0]

    def report(self) -> dict[str, Any]:
        """Return the tensors that could not be loaded, as a message between ranks carries them."""
        return _report(self.info)

    def add_report(self, report: dict[str, Any]) -> None:
        """Take what another rank could not load as not loaded here."""
        info = self.info
        info.unexpected_keys |= {*report["unexpected"]}
        info.mismatched_keys |= {
            (name, torch.Size(found), torch.Size(wanted)) for name, found, wanted in report["mismatched"]
        }
        info.error_msgs += [error for error in report["errors"] if error not in info.error_msgs]
        info.conversion_errors |= report["conversions"]


def _by_layer(
    model, mapping: list, layers: list[DecoderLayer], state_dict: dict[str, Any]
) -> dict[int | None, dict[str, Any]]:
    """Split a checkpoint by layer, by the names that transformers gives its tensors; `None` for what is in no layer."""
    from transformers import core_model_loading as loading

    layer_of = {name: index for index, layer in enumerate(layers) for name in layer.parameters}
    renamings = [entry for entry in mapping if isinstance(entry, loading.WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, loading.WeightConverter)]
    expected, prefix = model.state_dict(), model.base_model_prefix
    groups = defaultdict(dict)
    for key, tensor in state_dict.items():
        renamed, _ = loading.rename_source_key(key, renamings, converters, prefix, expected)
        if renamed not in expected and key in expected:
            renamed, _ = loading.rename_source_key(key, [], [], prefix, expected)
        groups[layer_of.get(renamed)][key] = tensor
    return groups


def _report(info: Any) -> dict[str, Any]:
    return {
        "unexpected": sorted(info.unexpected_keys),
        "mismatched": sorted([name, [*found], [*wanted]] for name, found, wanted in info.mismatched_keys),
        "errors": list(info.error_msgs),
        "conversions": dict(info.conversion_errors),
    }


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()

"""The memory that an optimizer keeps per trainable value."""

import difflib
from typing import Any

# By the Trainer's `optim`: number of states with the Trainer's arguments (transformers 5.17, `trainer_optimizer.py`)
# times bytes per state. Paged states are counted as on the GPU, where they are while memory lasts. GaLore and APOLLO
# project their states, by a rank that only the run knows: theirs is an upper bound.
_STATE_BYTES = {
    **dict.fromkeys(("sgd", "adafactor", "lomo", "adalomo", "galore_adafactor", "galore_adafactor_layerwise"), 0),
    **dict.fromkeys(("adamw_torch_4bit", "lion_8bit", "paged_lion_8bit", "rmsprop_bnb_8bit"), 1),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "adamw_torch_8bit"), 2),
    **dict.fromkeys(("galore_adamw_8bit", "galore_adamw_8bit_layerwise"), 2),
    **dict.fromkeys(("ademamix_8bit", "paged_ademamix_8bit"), 3),
    **dict.fromkeys(("lion_32bit", "paged_lion_32bit", "adagrad", "schedule_free_sgd"), 4),
    **dict.fromkeys(("rmsprop", "rmsprop_bnb", "rmsprop_bnb_32bit"), 4),
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused"), 8),
    **dict.fromkeys(("adamw_anyprecision", "paged_adamw_32bit", "stable_adamw"), 8),
    **dict.fromkeys(("galore_adamw", "galore_adamw_layerwise", "apollo_adamw", "apollo_adamw_layerwise"), 8),
    **dict.fromkeys(("schedule_free_radam", "schedule_free_adamw"), 8),
    **dict.fromkeys(("ademamix", "paged_ademamix_32bit", "grokadamw"), 12),
}
_ADAM_BYTES = 8


def state_bytes(optim: Any) -> int:
    """Return the bytes of state per trainable value of a Trainer's `optim`; raise `ValueError` for an unknown name."""
    name = getattr(optim, "value", optim)
    if name not in _STATE_BYTES:
        close = difflib.get_close_matches(str(name), _STATE_BYTES, n=1)
        advice = f"Did you mean {close[0]!r}?" if close else f"Known are {', '.join(sorted(_STATE_BYTES))}."
        raise ValueError(f"optim={name!r} is not an optimizer of the Trainer. {advice}")
    return _STATE_BYTES[name]


def state_bytes_or_adams(optim: Any) -> int:
    """Return [`state_bytes`], or those of AdamW in 32 bits for a name that only a later Trainer knows."""
    return _STATE_BYTES.get(getattr(optim, "value", optim), _ADAM_BYTES)

"""
The cases of the GPU tests, by launch: what runs in one process per GPU, one after the other.

The table is plain data, because pytest reads it without importing PyTorch. A case is `module:function` of this package with
its options; `model` and `data` name what `tests/gpu/materials.py` makes. `tests/workers/run_cases.py` runs them in this order.
"""

# For comparisons of losses: a step of few tokens is sensitive to rounding.
_LARGE_STEPS = {"per_device_train_batch_size": 4}
_LORA = {"measure": True}
_EMBEDDING = ["q_proj", "v_proj", "embed_tokens"]
# Samples of similar length, so that each step on a rank needs more than the half of the largest.
_PRESSED = {"per_device_train_batch_size": 8, "max_steps": 8, "max_length": 128}
# A change of weights beyond the rounding of merged ones.
_CHECKPOINTS = _LARGE_STEPS | {"save_strategy": "steps", "save_steps": 10, "learning_rate": 3e-4}
_FROM_TEN = "two/life/run/checkpoint-10"
# So that random weights learn more in 20 steps than the losses of steps differ.
_FAST = {"learning_rate": 1e-3}
_EXPERTS = _LARGE_STEPS | _FAST | {"router_aux_loss_coef": 0.1}
# Compiling takes up to a minute for each kind of model and trainer on an H100; that of LoRA's cases is compiled.
_NOT_COMPILED = {"compiles": False}
_MOE = _NOT_COMPILED | {"model": "moe"}
_TWO_MICRO_STEPS = {"gradient_accumulation_steps": 2}
# So that losses of preferences leave their first values, which are the same for all models.
_VISIBLY = {"learning_rate": 3e-4}


def _preferences(name: str, **args) -> tuple[str, dict]:
    """A case such as `dpo-4bit`."""
    method, bits = name.split("-")
    load = {"load_in_4bit": bits == "4bit"}
    how = {"method": method.upper(), "load": load, "args": _VISIBLY | args}
    return "training:fine_tune", _LORA | _NOT_COMPILED | how


# The methods that read a reference model read it in 4 bits too.
PREFERENCES = ("dpo-16bit", "dpo-4bit", "kto-4bit", "orpo-16bit")

# Trainings of the same samples with the same losses as lora-16bit or lora-4bit.
_IN_4BIT, _FROM_HOST, _SHARDED = (
    {"load": {"load_in_4bit": True}},
    {"frozen_weights": "host"},
    {"frozen_weights": "sharded"},
)
_RECOMPUTES = {"plugin": {"gradient_checkpointing": "unsloth"}}
VARIANTS = {
    "host-16bit": _FROM_HOST | {"decode": True},
    "sharded-16bit": _SHARDED | {"evaluate": True, "save": True, "decode": True},
    "sharded-recomputes-4bit": _SHARDED | _IN_4BIT | _RECOMPUTES,
    "partly-recomputes-16bit": {"recompute_first": 10},
}

CASES: dict[str, dict[str, tuple[str, dict]]] = {
    # Two processes, on two GPUs that nobody else uses.
    "two": {
        # First, because their first line is to be the first that loads anything.
        "recent": ("scripts:run", {"script": "unsloth_recent.py"}),
        "notebook": ("scripts:run", {"script": "unsloth_notebook.py"}),
        "explicit": ("scripts:run", {"script": "unsloth_recent.py", "explicit": True}),
        "lora-16bit": ("training:fine_tune", _LORA | {"args": _LARGE_STEPS}),
        "lora-4bit": ("training:fine_tune", _LORA | {"args": _LARGE_STEPS, "load": {"load_in_4bit": True}}),
        **{name: _preferences(name) for name in PREFERENCES},
        **{name: ("training:fine_tune", _LORA | {"args": _LARGE_STEPS} | how) for name, how in VARIANTS.items()},
        "peers": ("peers:copy", {}),
        "modules_to_save": ("training:fine_tune", {"lora": {"modules_to_save": ["lm_head"]}, "evaluate": True}),
        "embedding-lora": ("training:fine_tune", {"lora": {"target_modules": _EMBEDDING}, "evaluate": True}),
        "frozen-16bit": ("training:change_a_frozen_weight", {}),
        "frozen-4bit": ("training:change_a_frozen_weight", {"load": {"load_in_4bit": True}}),
        "life": ("training:fine_tune", {"args": _CHECKPOINTS, "evaluate": True, "save": True}),
        "life-resumed": ("training:fine_tune", {"args": _CHECKPOINTS, "resume": _FROM_TEN}),
        "free": ("training:fine_tune", {"args": _PRESSED}),
        "pressed": ("training:fine_tune", {"args": _PRESSED, "fill_memory_of_rank": 1}),
        "moe": ("training:fine_tune", _MOE | _SHARDED | {"args": _EXPERTS}),
        # Last, because `FastModel`, which also loads full fine-tunes, replaces a model's classes for good.
        "vision": (
            "training:fine_tune",
            _NOT_COMPILED
            | {"model": "vision", "loader": "FastModel", "lora": {"finetune_vision_layers": True}, "args": _FAST},
        ),
        "full": ("training:fine_tune", _NOT_COMPILED | {"load": {"full_finetuning": True}, "evaluate": True}),
    },
    # One process, on the first GPU.
    "one": {
        "loaders": ("scripts:loaders", {}),
        "varlen": ("varlen:compare", {}),
        "lora-16bit": ("training:fine_tune", _LORA | {"args": _LARGE_STEPS | _TWO_MICRO_STEPS}),
        "lora-4bit": (
            "training:fine_tune",
            _LORA | {"args": _LARGE_STEPS | _TWO_MICRO_STEPS, "load": {"load_in_4bit": True}},
        ),
        **{name: _preferences(name, **_TWO_MICRO_STEPS) for name in PREFERENCES},
        "life-resumed": ("training:fine_tune", {"args": _CHECKPOINTS | _TWO_MICRO_STEPS, "resume": _FROM_TEN}),
        "moe": ("training:fine_tune", _MOE | {"args": _EXPERTS | _TWO_MICRO_STEPS}),
    },
    # One process, which has the last GPU for itself but for the neighbours that cases start.
    "margin": {
        "recomputing": ("margin:fine_tune", {"plugin": {"gradient_checkpointing": "unsloth"}}),
        "auto": ("margin:fine_tune", {}),
        "busy": ("margin:fine_tune", {"evaluate": True, "generate": True}),
        "fraction": ("margin:fine_tune", {"plugin": {"memory_fraction": 0.15}}),
        "capped": ("margin:fine_tune", {"cap_gib": 1.5}),
        "neighbour": ("margin:fine_tune", {"neighbour_leaves_gib": 12}),
        "growing-neighbour": ("margin:fine_tune", {"neighbour_leaves_gib": 6, "neighbour_grows_at_step": 2}),
    },
}

PROCESSES = {"two": 2, "one": 1, "margin": 1}


def materials_of(launch: str, names: list[str]) -> set[str]:
    """What has to be made before these cases run."""
    model, data = ("1b", "long") if launch == "margin" else ("real", "uneven")
    options = [CASES[launch][name][1] for name in names]
    return {option.get("model", model) for option in options} | ({data} if names else set())


def entries_of(launch: str, names: list[str]) -> list[dict]:
    """These cases as `run_cases.py` takes them, in the order of the table."""
    return [
        {"name": name, "function": f"{__name__}.{function}", "options": options}
        for name, (function, options) in CASES[launch].items()
        if name in names
    ]

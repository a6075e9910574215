"""Scripts as Unsloth's users write them, and what `enable_multi_gpu` replaces. Nothing here may load a library before them."""

import runpy
import sys


def run(case, script: str, explicit: bool = False):
    """
    Run a script of `tests/workers` as the main module of this process: its losses.

    Args:
        explicit (`bool`): Whether it gets the explicit imports instead of the line in front of it.
    """
    import accelerate_unsloth
    from tests.launch.test_unmodified_scripts import EXPLICIT, UNTOUCHED, losses, rewritten
    from tests.launching import WORKERS

    file, out = WORKERS / script, case.out / "out"
    if explicit:  # a CPU has to be named there
        changes = {old: new for old, new in EXPLICIT.items() if "import" in old or not case.on_gpu}
        folder = case.out / f"rank{case.rank}"
        folder.mkdir(exist_ok=True)
        file = rewritten(script, UNTOUCHED, changes, folder)
    arguments, sys.argv = sys.argv, [str(file), case.material("real"), case.material("uneven.jsonl"), str(out)]
    try:
        runpy.run_path(str(file), run_name="__main__")
    finally:
        sys.argv = arguments
        accelerate_unsloth.disable_multi_gpu()
    return {"losses": losses(out)}


def loaders(case):
    """Whether each loader of Unsloth's is replaced inside of the context, and back outside of it."""
    import accelerate_unsloth

    names = ["FastLanguageModel", "FastModel", "FastVisionModel", "FastTextModel"]
    with accelerate_unsloth.enable_multi_gpu():
        import unsloth

        inside = [getattr(unsloth, name) for name in names]
    outside = [getattr(unsloth, name) for name in names]
    return {name: issubclass(a, b) and a is not b for name, a, b in zip(names, inside, outside, strict=True)}

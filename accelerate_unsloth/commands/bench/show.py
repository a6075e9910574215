"""The figures of a benchmark as a table, as JSON and as a chart."""

import json
import platform
from pathlib import Path

from ..env.checks import installed_version

_PACKAGES = [
    "accelerate_unsloth",
    "unsloth",
    "trl",
    "transformers",
    "accelerate",
    "peft",
    "torch",
    "bitsandbytes",
    "xformers",
    "flash-attn",
]
_HEADINGS = (
    "run", "tokens/s", "x", "scaling", "end to end s", "start-up s", "imbalance", "GPU GiB", "host GiB", "loss", "loss diff.", "attention",
)  # fmt: skip


def hardware() -> dict:
    """Return the GPUs, the processor and the versions that figures were measured on."""
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    versions = {name: installed_version(name) or "not installed as a package" for name in _PACKAGES}
    return {"gpus": gpus, "processor": platform.processor() or platform.machine(), "versions": versions}


def print_table(results: list[dict]) -> None:
    """
    Print one line a run, and below why runs failed.

    `x` compares a run with the best plain run of as many processes, scaling with its kind on the fewest.
    """
    from rich.table import Table
    from rich.text import Text

    from ...reporting.startup_table import console

    table = Table(title="accelerate-unsloth bench", title_justify="left", pad_edge=False)
    for heading in _HEADINGS:
        table.add_column(heading, justify="left" if heading == "run" else "right")
    for result in results:
        if "error" in result:
            table.add_row(result["name"], "failed")
            continue
        startup_s = result["end_to_end_s"] - result["phases_s"]["trained"] - result["phases_s"]["saved"]
        table.add_row(
            result["name"],
            _number(result["tokens_per_second"], ",.0f"),
            _number(ratio_to_plain(result, results), ".2f"),
            _number(scaling(result, results), ".1%"),
            _number(result["end_to_end_s"], ".0f"),
            _number(startup_s, ".0f"),
            _number(result["imbalance"], ".3f"),
            _number(max((p for p in result["peak_gib"] if p is not None), default=None), ".1f"),
            _number(result["peak_host_gib"], ".1f"),
            _number(result["losses"][-1] if result["losses"] else None, ".4f"),
            _number(loss_difference(result, results), ".0e"),
            result["attention"],
        )
    table.caption, table.caption_justify = Text("\n".join(failures(results))), "left"
    console(width=140).print(table)


def ratio_to_plain(result: dict, results: list[dict]) -> float | None:
    """Return tokens per second over those of the best plain run of as many processes; `None` without one."""
    plain = [
        other["tokens_per_second"] or 0
        for other in results
        if (other.get("how"), other.get("processes")) == ("plain", result["processes"])
        and other.get("gpu_gib") == result.get("gpu_gib")
        and "error" not in other
    ]
    best = max(plain, default=0)
    return result["tokens_per_second"] / best if best and result["tokens_per_second"] else None


def failures(results: list[dict]) -> list[str]:
    """Return a sentence about each run that failed."""
    failed = [result for result in results if "error" in result]
    return [f"{result['name']}: failed with status {result['error']}: {result['reason']}" for result in failed]


def loss_difference(result: dict, results: list[dict]) -> float | None:
    """Return the largest relative difference of a loss to the first plain run with this effective batch; `None` without one."""
    plain = [
        other["losses"]
        for other in results
        if (other["how"], other["effective_batch"]) == ("plain", result["effective_batch"]) and "error" not in other
    ]
    if not plain or result["how"] == "plain":
        return None
    pairs = zip(result["losses"], plain[0], strict=False)
    return max((abs(loss - of_plain) / max(abs(of_plain), 1e-12) for loss, of_plain in pairs), default=None)


def scaling(result: dict, results: list[dict]) -> float | None:
    """Return tokens per second a process, over those of the same kind of run on the fewest processes; `None` for that one."""
    alike = [
        other
        for other in results
        if all(other.get(name) == result.get(name) for name in ("how", "environment", "gpu_gib"))
        and other.get("tokens_per_second")
        and (result["how"] == "ours" or other["batch"] == result["batch"])
    ]
    fewest = min(alike, key=lambda other: other["processes"], default=None)
    if fewest is None or fewest["processes"] == result["processes"] or not result["tokens_per_second"]:
        return None
    return result["tokens_per_second"] / result["processes"] * fewest["processes"] / fewest["tokens_per_second"]


def write_json(results: list[dict], workload: dict, file: Path) -> None:
    file.write_text(json.dumps({"hardware": hardware(), "workload": workload, "runs": results}, indent=1))


def write_chart(results: list[dict], file: Path) -> None:
    """Draw bars of tokens/s, and tokens/s over the number of processes beside a line of perfect scaling."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    done = [result for result in results if result.get("tokens_per_second")]
    figure, (bars, lines) = pyplot.subplots(1, 2, figsize=(13, 1.5 + 0.4 * max(6, len(done))))
    colours = ["tab:blue" if result["how"] == "ours" else "tab:gray" for result in done]
    bars.barh([result["name"] for result in done], [result["tokens_per_second"] for result in done], color=colours)
    bars.invert_yaxis()
    bars.set_xlabel("tokens/s, all processes")
    for how in ("plain", "trl", "ours"):
        best = {}
        for result in done:
            if result["how"] == how and not result["environment"]:
                best[result["processes"]] = max(best.get(result["processes"], 0), result["tokens_per_second"])
        if best:
            counts = sorted(best)
            lines.plot(counts, [best[count] for count in counts], marker="o", label=how)
            lines.plot(counts, [best[counts[0]] * count / counts[0] for count in counts], ls=":", color="lightgray")
    lines.set_xlabel("processes")
    lines.set_ylabel("tokens/s (dotted: perfect scaling)")
    if done:
        lines.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _number(value, form: str) -> str:
    return "" if value is None else format(value, form)

"""
Draw the README's figure from the committed measurements: tokens/s, and losses on top of each other.

    python benchmarks/figure.py docs/speed_and_losses.png
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

FOLDER = Path(__file__).parent
SETTINGS = {
    "notebook": "settings of the notebooks\n(batch 2 x accumulation 4)",
    "best batch": "plain at its best batch\n(16 x 2)",
}
PLAIN, OURS = "tab:gray", "tab:blue"


def main(file: str) -> None:
    measured = json.loads((FOLDER / "h100_two_gpus.json").read_text())
    runs = {
        setting: {run["how"]: run for run in measured[setting]["runs"] if not run["environment"]}
        for setting in SETTINGS
    }
    figure, (bars, lines) = pyplot.subplots(1, 2, figsize=(11, 3.6))
    draw_speed(bars, runs)
    draw_losses(lines, runs["best batch"])
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def draw_speed(axes, runs: dict) -> None:
    for turn, (how, colour, label) in enumerate(
        [("plain", PLAIN, "Unsloth under DDP"), ("ours", OURS, "accelerate_unsloth")]
    ):
        rates = [runs[setting][how]["tokens_per_second"] for setting in SETTINGS]
        drawn = axes.bar([place + 0.36 * turn for place in range(len(rates))], rates, 0.34, color=colour, label=label)
        axes.bar_label(drawn, [f"{rate:,.0f}" for rate in rates], fontsize=9)
    axes.set_xticks([place + 0.18 for place in range(len(SETTINGS))], SETTINGS.values())
    axes.set_ylabel("tokens/s, both GPUs")
    axes.set_title("Two H100, Llama-3.1-8B dims, 4 bits", fontsize=10)
    axes.margins(y=0.12)
    axes.legend(frameon=False, loc="upper left")


def draw_losses(axes, runs: dict) -> None:
    for how, colour, label, width, style in (
        ("plain", PLAIN, "Unsloth under DDP", 5, "-"),
        ("ours", OURS, "accelerate_unsloth", 1.4, "-"),
    ):
        losses = runs[how]["losses"]
        axes.plot(range(1, len(losses) + 1), losses, style, color=colour, label=label, linewidth=width)
    pairs = zip(runs["plain"]["losses"], runs["ours"]["losses"], strict=True)
    largest = max(abs(one - other) / one for one, other in pairs)
    axes.set_xlabel("step, 64 samples each")
    axes.set_ylabel("loss")
    axes.set_title(f"Same losses: largest difference {largest:.1e}", fontsize=10)
    axes.legend(frameon=False)


if __name__ == "__main__":
    main(sys.argv[1])

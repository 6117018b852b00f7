"""Draws the pictures of README and docs, from recorded numbers.

python -m docs.make.pictures [FOLDER]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot
from matplotlib.patches import FancyArrowPatch, Rectangle

ROOT = Path(__file__).parents[2]
TEXT, COMP, FULL, GREY = "#d9dde3", "#e07b39", "#3b6ea8", "#666666"
# Text stays text, so that a test can read it, and the file does not change with the day.
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "jax_ccm", "font.size": 9, "font.family": "sans-serif"}


def read(path: str) -> dict[str, Any]:
    return json.loads((ROOT / path).read_text())


def boxes(axes: Any, x: float, y: float, letters: str, colour: str) -> None:
    """A row of tokens."""
    for number, letter in enumerate(letters):
        axes.add_patch(Rectangle((x + number, y), 0.92, 0.92, facecolor=colour, edgecolor="white"))
        axes.text(x + number + 0.46, y + 0.44, letter, ha="center", va="center", fontsize=8)


def arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], colour: str = GREY) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, color=colour, shrinkA=0, shrinkB=0))


def draw_chunks(axes: Any) -> None:
    """Chunks, each followed by two compression tokens, whose keys and values go to the memory."""
    axes.set(xlim=(-0.2, 26.5), ylim=(-1.7, 6.4))
    axes.axis("off")
    for number, text in enumerate(("a b c", "d e f g", "h i")):
        letters = text.replace(" ", "")
        x = (0, 7, 15)[number]
        boxes(axes, x, 4, letters, TEXT)
        boxes(axes, x + len(letters), 4, "CC", COMP)
        axes.text(x, 5.3, f"chunk {number + 1}", color=GREY, va="bottom")
        boxes(axes, 8 + 2.3 * number, 0, "CC", COMP)
        arrow(axes, (x + len(letters) + 1, 3.85), (9 + 2.3 * number, 1.05), COMP)
    axes.text(0, 3.1, "text is dropped", color=GREY, va="center")
    axes.text(7.6, 0.44, "memory", ha="right", va="center", weight="bold")
    axes.add_patch(Rectangle((7.8, -0.25), 7.0, 1.45, fill=False, edgecolor=COMP, linewidth=1.2))
    boxes(axes, 21, 4, "j k ?".replace(" ", ""), TEXT)
    axes.text(21, 5.3, "question, answer", color=GREY, va="bottom")
    arrow(axes, (14.9, 0.6), (21.8, 3.85))
    axes.text(19.4, 1.6, "sees the memory, no old text", color=GREY, va="center")
    axes.text(7.8, -1.3, "appended, or averaged into two slots for ever", color=GREY, va="center")


def memory(path: Path) -> None:
    """What becomes of text, and the bytes of a session by the turns before it (results/bench/smollm2)."""
    results = read("results/bench/smollm2/bench.json")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 2.9), width_ratios=(1.75, 1))
    draw_chunks(left)
    shown = {"full": ("full context", FULL), "concat": ("concat", COMP), "merge": ("merge", "#b3261e")}
    for name, (label, colour) in shown.items():
        mib = [(row["turns"], row["systems"][name]["state_bytes"] / 2**20) for row in results["turns"]]
        right.plot(*zip(*mib, strict=True), "o-", color=colour, markersize=3)
        right.annotate(
            f"{label}: {mib[-1][1]:,.1f}", mib[-1], xytext=(-4, 5), textcoords="offset points", ha="right", color=colour
        )
    right.set(xscale="log", yscale="log", xlabel="turns of 32 tokens before", ylabel="MiB of a session")
    right.set_ylim(top=6e3)
    right.spines[["top", "right"]].set_visible(False)
    write(figure, path)


def content_share(path: Path) -> None:
    """Losses with the right and with a wrong context, of full context and of a memory (results/dialog/concat)."""
    row = read("results/dialog/concat/results.json")["steps"][-1]
    figure, axes = pyplot.subplots(figsize=(7.2, 3.1))

    def nll(cell):
        return cell["nll"]["value"]

    none = nll(row["systems"]["none"])
    axes.axvline(none, ymax=0.85, color=GREY, linestyle=":")
    axes.text(none, 1.62, f"no context: {none:.2f}", ha="center", color=GREY)
    for y, (name, label, colour) in enumerate((("memory", "memory", COMP), ("full", "full context", FULL))):
        cell = row["systems"][name]
        right, wrong = nll(cell), nll(cell["wrong"])
        axes.plot([right, wrong], [y, y], color=colour, linewidth=7, solid_capstyle="butt", alpha=0.45)
        axes.plot([right], [y], "o", color=colour)
        axes.plot([wrong], [y], "o", markerfacecolor="white", color=colour)
        axes.text(right, y + 0.17, f"right: {right:.2f}", ha="center", color=colour)
        axes.text(wrong, y + 0.17, f"wrong: {wrong:.2f}", ha="center", color=colour)
        axes.text((right + wrong) / 2, y - 0.28, f"knows {wrong - right:.2f} nats", ha="center", color=colour)
        axes.text(2.9, y, label, ha="right", va="center", weight="bold", color=colour)
    share = row["content_share"]["value"]
    axes.set(xlim=(2.72, 3.45), ylim=(-0.5, 1.85), yticks=[], xlabel="loss of the next turn, nats a token")
    axes.set_title(f"content share: the memory still knows {share:.0%} of what full context knows", fontsize=9)
    axes.spines[["top", "right", "left"]].set_visible(False)
    write(figure, path)


def write(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    # Matplotlib ends lines with blanks.
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")


PICTURES = {"memory.svg": memory, "content_share.svg": content_share}


def main(folder: Path) -> None:
    with pyplot.rc_context(STYLE):
        for name, draw in PICTURES.items():
            draw(folder / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else ROOT / "docs" / "pictures")

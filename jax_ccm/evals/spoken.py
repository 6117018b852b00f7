"""Tables of what systems say: replies to questions, and continuations of texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax_ccm.evals.cells import STYLE, discriminates, interval, name_of_steps

# What a table of replies calls the measures, and what else it tells of the last of them.
REPLIES = {"exact": "exact", "f1": "F1", "contains": "contains"}
DIFFERENCES = {"minus_wrong": "- wrong memory", "minus_none": "- none"}


def reply_rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of generated replies, a row for each time step and system; no rows without any."""
    header = [name_of_steps(results)[0], "replies", *REPLIES.values()]
    header += [f"contains {name}" for name in DIFFERENCES.values()] + ["tokens", "cut off"]
    rows = []
    for step in results["steps"]:
        for name in STYLE:
            cell = step["systems"].get(name, {})
            if "replies" not in cell:
                continue
            said, wrong = cell["replies"], cell.get("wrong", {}).get("replies")

            def control(key, wrong=wrong):
                return f" ({wrong[key]['value']:.2f})" if wrong else ""

            mark = " †" if discriminates(step, "contains") is False else ""
            row = [
                f"{step['step']}{mark}",
                STYLE[name][1],
                *(f"{said[key]['value']:.2f}{control(key)}" for key in REPLIES),
            ]
            found = cell.get("differences", {}).get("contains", {})
            row += [interval(found.get(key)) for key in DIFFERENCES]
            rows.append([*row, f"{said['tokens']:.1f}", f"{said['cut']:.0%}"])
    return header, rows


# Columns of continuations; those that were not measured are left out.
CONTINUATIONS = {
    "judge_perplexity": "judge perplexity", "rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L",
    "bleu": "BLEU", "similarity": "similarity", "distinct2": "distinct-2", "self_bleu": "self-BLEU",
}  # fmt: skip


def continuation_rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of continuations, a row for each system; no rows without any."""
    said = {name: cell["continuations"] for name, cell in _systems(results) if "continuations" in cell}
    if not said:
        return [], []
    shown = [key for key in CONTINUATIONS if all(key in found for found in said.values())]

    def told(found, key):
        if key not in found:
            return "-"
        digits = 1 if key == "judge_perplexity" else 3
        return f"{found[key]['value']:.{digits}f} ± {found[key]['error'] or 0:.{digits}f}"

    named = {STYLE[name][1]: found for name, found in said.items()} | {"what really comes": results["reference"]}
    rows = [[name, *(told(found, key) for key in shown)] for name, found in named.items()]
    return ["continued by", *(CONTINUATIONS[key] for key in shown)], rows


def legend(results: Mapping[str, Any]) -> list[str]:
    """What the columns of both tables mean, a line each."""
    cells, asked, lines = [cell for _, cell in _systems(results)], results["config"]["eval"], []
    if any("replies" in cell for cell in cells):
        tokens = asked["reply_tokens"]
        lines.append(f"exact, F1: greedy replies of up to {tokens} tokens beside the answer, compared as SQuAD does")
        lines.append("contains: share of replies in which the (short) answer stands, word for word")
        lines.append("contains - …: how much more than with a wrong memory or without context, paired, 95 % interval")
    if any("continuations" in cell for cell in cells):
        lines.append(
            f"continued: {asked['samples']} times each, up to {asked['reply_tokens']} tokens, nucleus of "
            f"{asked['top_p']}; ± bootstrap error over texts"
        )
        lines.append(
            f"judge perplexity: of the continuation behind its whole prompt, by {results['reference']['judge']}"
        )
        lines.append("ROUGE, BLEU, similarity: beside what really comes; distinct-2: different pairs of words")
        lines.append("self-BLEU: beside the other continuations of the prompt")
    return lines


def _systems(results: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Those of the first row, in the order in which they are shown."""
    systems = results["steps"][0]["systems"]
    return [(name, systems[name]) for name in STYLE if name in systems]

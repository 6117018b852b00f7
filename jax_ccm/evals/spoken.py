"""Tables of what systems say: replies to questions, and continuations of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    said = [(STYLE[name][1], cell["continuations"]) for name, cell in _systems(results) if "continuations" in cell]
    return continued_by(said, results["reference"]) if said else ([], [])


def continued_by(said: Sequence[tuple[str, Mapping[str, Any]]], reference: Mapping[str, Any]):
    """Header and rows of a table of continuations.

    Args:
      said: names of systems, and what was measured of their continuations; a name may stand more than once.
      reference: the same of what really comes.
    """
    shown = [key for key in CONTINUATIONS if all(key in found for _, found in said)]

    def told(found, key):
        if key not in found:
            return "-"
        digits = 1 if key == "judge_perplexity" else 3
        return f"{found[key]['value']:.{digits}f} ± {found[key]['error'] or 0:.{digits}f}"

    rows = [[name, *(told(found, key) for key in shown)] for name, found in [*said, ("what really comes", reference)]]
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
        lines += continuation_legend(asked, results["reference"])
    return lines


def continuation_legend(asked: Mapping[str, Any], reference: Mapping[str, Any]) -> list[str]:
    """What the columns of a table of continuations mean, a line each.

    Args:
      asked: the section ``eval`` of the config.
      reference: as for `continued_by`.
    """
    return [
        f"continued: {asked['samples']} times each, up to {asked['reply_tokens']} tokens, nucleus of "
        f"{asked['top_p']}; ± bootstrap error over texts",
        f"judge perplexity: of the continuation behind its whole prompt, by {reference['judge']}",
        "ROUGE, BLEU, similarity: beside what really comes; distinct-2: different pairs of words",
        "self-BLEU: beside the other continuations of the prompt",
    ]


def _systems(results: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Those of the first row, in the order in which they are shown."""
    systems = results["steps"][0]["systems"]
    return [(name, systems[name]) for name in STYLE if name in systems]

"""A report as one page of HTML that needs nothing from outside: pictures stand in it as SVG."""

from __future__ import annotations

import contextlib
import html
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_ccm.benchmarks import report as speed
from jax_ccm.errors import UserError
from jax_ccm.evals import comparison, heatmap, report
from jax_ccm.evals.cells import control_of
from jax_ccm.reports import charts, tables
from jax_ccm.reports.folders import Found
from jax_ccm.reports.tables import Table

# How many replies of each system are shown.
REPLIES = 4
STYLE = """
:root { color-scheme: light dark; --ink: #1d2126; --soft: #5c6670; --line: #d5dae0; --paper: #ffffff; --shade: #f4f6f8;
  --accent: #b3394c; }
@media screen and (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #9aa4ae; --line: #3a424b;
  --paper: #15181c; --shade: #1e2328; --accent: #e8798a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .25rem; line-height: 1.2; }
h2 { font-size: 1.25rem; margin: 2.75rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.75rem 0 .5rem; overflow-wrap: anywhere; }
p { max-width: 46rem; margin: .5rem 0; }
p, li { color: var(--ink); } .soft, figcaption, nav { color: var(--soft); }
nav { margin: 1rem 0 0; } nav a { color: inherit; margin-right: 1rem; white-space: nowrap; }
a { color: var(--accent); }
figure { margin: .75rem 0 1rem; } figure svg { display: block; width: 100%; height: auto; }
figure svg text { font-family: inherit; } figcaption { font-size: .85rem; max-width: 46rem; }
.wide { overflow-x: auto; margin: .5rem 0; }
table { border-collapse: collapse; font-size: .8rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .5rem; text-align: right; vertical-align: top; white-space: nowrap; }
th { border-bottom: 2px solid var(--line); font-weight: 600; vertical-align: bottom; white-space: normal; }
td { border-bottom: 1px solid var(--line); }
th.text, td.text { text-align: left; } td.long { white-space: normal; min-width: 14rem; overflow-wrap: anywhere; }
tr.part td { border-top: 2px solid var(--line); }
tr.weak td { color: var(--soft); }
ul.legend { font-size: .85rem; color: var(--soft); padding-left: 1.1rem; margin: .5rem 0; }
ul.legend li { color: inherit; max-width: 60rem; overflow-wrap: anywhere; }
code { font: .8rem/1.45 ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
details { margin: .5rem 0; } summary { cursor: pointer; color: var(--soft); font-size: .9rem; }
@media print { body { max-width: none; padding: 0; font-size: 10pt; } nav { display: none; }
  h2 { break-after: avoid; } h3 { break-after: avoid; } figure, tr { break-inside: avoid; }
  .wide { overflow: visible; } table { font-size: 6pt; } th, td { padding: .1rem .2rem; } p { break-after: avoid; }
  td.long { min-width: 0; } ul.legend { font-size: 7pt; } @page { margin: 12mm; } }
"""


class Page:
    """A page in the making."""

    def __init__(self, folder: Path):
        self.folder, self.sections, self.pictures = folder, [], []

    def section(self, title: str, parts: Iterator[str]) -> None:
        """Adds a section, if there is anything in it."""
        # Made first: a section with nothing in it has no heading either.
        body = "\n".join(parts)
        if body:
            self.sections.append((re.sub(r"\W+", "-", title.lower()).strip("-"), title, body))

    def picture(self, name: str, title: str, make: Callable[[], Any], caption: str = "") -> str:
        """A figure, in the page and as PNG beside it."""
        name = re.sub(r"[^\w.-]+", "-", name).strip("-.")
        # Names that differ only in what a file's name cannot have must not overwrite each other.
        while name in self.pictures:
            name += "-"
        self.pictures.append(name)
        drawing = charts.drawn(make, name, html.escape(title, quote=True), self.folder)
        return f"<figure>{drawing}<figcaption>{html.escape(caption)}</figcaption></figure>"

    def write(self, title: str, command: str, versions: str) -> str:
        """The whole page."""
        links = "".join(f'<a href="#{name}">{html.escape(text)}</a>' for name, text, _ in self.sections)
        body = "\n".join(f'<section id="{n}"><h2>{html.escape(t)}</h2>\n{b}\n</section>' for n, t, b in self.sections)
        return (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{html.escape(title)}</title>\n'
            f"<style>{STYLE}</style></head>\n<body><h1>{html.escape(title)}</h1>\n"
            f'<p class="soft"><code>{html.escape(command)}</code><br>{html.escape(versions)}</p>\n'
            f"<nav>{links}</nav>\n{body}\n</body></html>\n"
        )


def make(found: Sequence[Found], folder: Path, *, title: str, command: str, versions: str) -> str:
    """The page of what commands left behind; its pictures are written beside it as PNG.

    Args:
      found: of `folders.find`.
      folder: where the pictures go.
      title: of the page.
      command: that made it.
      versions: of software, for its head.

    Raises:
      UserError: for a file that lacks what its command writes.
    """
    page = Page(folder)

    def of(kind):
        return [one for one in found if one.kind == kind]

    rows = []
    for one in found:
        with whole(one):
            rows.append(tables.overview(one))
    page.section("What is here", iter([table((tables.OVERVIEW, rows, 4))]))
    page.section("Quality", _each(of("evaluation"), _quality, page))
    page.section("Quality against bytes", _bytes(of("evaluation"), of("comparison"), page))
    page.section("Recall by age and length", _each(of("evaluation"), _recall, page))
    page.section("Where questions look", _each(of("evaluation"), _attention, page))
    page.section("What was said", _each(of("evaluation"), _replies, page))
    page.section("Training", _all(of("training"), page))
    page.section("Speed and memory", _each(of("speed"), _speed, page))
    page.section("How it was made", _each([one for one in found if "command" in one.content], _made, page))
    return page.write(title, command, versions)


@contextlib.contextmanager
def whole(one: Found) -> Iterator[None]:
    """Refuses a file that lacks something, while that is looked for."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        # A UserError is a ValueError, too, and says already what is wrong.
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{one.path} lacks something that its command writes ({type(error).__name__}: {error}); run the "
            "command again, or leave its folder out"
        ) from error


def _each(found: Sequence[Found], show: Callable[[Found, Page], Iterator[str]], page: Page) -> Iterator[str]:
    """What is shown of each, under its name."""
    for one in found:
        with whole(one):
            parts = [*show(one, page)]
        if parts:
            yield "\n".join([f"<h3>{html.escape(one.name)}</h3>", *parts])


def _quality(one: Found, page: Page) -> Iterator[str]:
    results = one.content
    yield page.picture(f"quality-{one.name}", f"Quality by step, {one.name}", lambda: report.figure_of(results))
    yield table(tables.quality(results), by=(0,))
    continued = tables.continuations(results)
    if continued[1]:
        yield "<p>Continuations:</p>"
        yield table(continued)
    said = tables.replies(results)
    if said[1]:
        yield f"<p>Generated replies, of up to {results['config']['eval']['reply_tokens']} tokens:</p>"
        yield table(said, by=(0,))
    told = [line for line in report.legend(results) if not line.startswith(("in brackets", "right:", "contains -"))]
    wrong = f"wrong context: the same turn after {control_of(results)}"
    yield legend([*told, wrong, "in brackets: 95 % bootstrap intervals"])


def _bytes(evaluations: Sequence[Found], comparisons: Sequence[Found], page: Page) -> Iterator[str]:
    groups = charts.alike(evaluations)
    for number, runs in enumerate(groups, 1):
        names = ", ".join(run.name for run in runs)
        yield page.picture(
            f"bytes-{number}", f"Quality against bytes, {names}", lambda runs=runs: charts.against_bytes(runs),
            f"The same questions: {names}.",
        )  # fmt: skip
    if len(groups) > 1:
        yield '<p class="soft">Evaluations that asked different questions stand in different pictures.</p>'
    yield from _each(comparisons, _comparison, page)


def _comparison(one: Found, page: Page) -> Iterator[str]:
    yield page.picture(
        f"comparison-{one.name}", f"Quality against bytes, {one.name}", lambda: comparison.figure_of(one.content)
    )
    yield table(tables.comparison(one.content))


def _recall(one: Found, page: Page) -> Iterator[str]:
    cells = one.content.get("recall", ())
    if heatmap.kind_of(cells):
        caption = "n: questions. †: full context does no better behind the right context than behind a wrong one."
        yield page.picture(f"recall-{one.name}", f"Recall, {one.name}", lambda: heatmap.figure_of(cells), caption)


def _attention(one: Found, page: Page) -> Iterator[str]:
    if found := one.content.get("attention"):
        caption = f"Of the question and its answer: means over heads, tokens and {found['examples']} questions."
        title = f"Attention by layer and slot, {one.name}"
        yield page.picture(f"attention-{one.name}", title, lambda: heatmap.attention_of(found), caption)


def _replies(one: Found, page: Page) -> Iterator[str]:
    if one.continuations:
        header, shown = (
            ["prompt", "what really comes", "system", "continuation", "ROUGE-L"],
            dict[str, list[list[str]]](),
        )
        for line in one.continuations:
            made = [line["prompt"], line["target"], line["system"], line["reply"], f"{line['rougeL']:.2f}"]
            shown.setdefault(line["system"], []).append(made)
        rows = sorted((row for made in shown.values() for row in made[:REPLIES]), key=lambda row: row[0])
        yield f"<details open><summary>The first {REPLIES} continuations of each system</summary>"
        yield table((header, rows, 4), long=(0, 1, 3), by=(0, 1))
        yield "</details>"
    if not one.replies:
        return
    rows, seen = [], dict[Any, int]()
    for line in one.replies:
        key = line["system"], line["context"]
        seen[key] = seen.get(key, 0) + 1
        if seen[key] <= REPLIES:
            found = "yes" if line["contains"] else "no"
            who = line["system"] + ("" if line["context"] == "right" else ", wrong context")
            rows.append([line["query"], line["target"], who, line["reply"], found, f"{line['f1']:.2f}"])
    # All systems' replies to a question together; the sort is stable.
    rows.sort(key=lambda row: row[0])
    header = ["question", "answer", "system", "reply", "contains", "F1"]
    yield f"<details open><summary>The first {REPLIES} questions of each system</summary>"
    yield table((header, rows, 4), long=(0, 1, 3), by=(0, 1))
    yield "</details>"


def _all(runs: Sequence[Found], page: Page) -> Iterator[str]:
    if runs:
        yield page.picture("training", "Loss by step", lambda: charts.training(runs))
        yield table(tables.training(runs))


def _speed(one: Found, page: Page) -> Iterator[str]:
    yield page.picture(
        f"speed-{one.name}", f"Time and memory of a turn, {one.name}", lambda: speed.figure_of(one.content)
    )
    for name in speed.shown(one.content):
        header, rows = speed.TABLES[name](one.content)
        yield f"<p>{html.escape(speed.TITLES[name])}</p>"
        yield table((header, rows, 1 + speed.named(header)))
    yield legend(speed.legend(one.content))


def _made(one: Found, page: Page) -> Iterator[str]:
    yield f"<p><code>{html.escape(str(one.content['command']))}</code></p>"


def table(made: Table, *, long: Sequence[int] = (), by: Sequence[int] = ()) -> str:
    """A table of HTML.

    Args:
      made: header, rows and how many of the first columns are text.
      long: columns that may hold long texts.
      by: columns whose changes part the rows, said once for each part.
    """
    header, rows, text = made

    def kind(number):
        return " ".join(["text"] * (number < text) + ["long"] * (number in long))

    def cell(tag, number, said):
        return f'<{tag} class="{kind(number)}">{html.escape(said)}</{tag}>'

    lines = ["".join(cell("th", number, said) for number, said in enumerate(header))]
    before = None
    body = []
    for row in rows:
        again = bool(by) and before is not None and all(before[n] == row[n] for n in by)
        marks = ["part"] * (bool(by) and before is not None and not again) + ["weak"] * row[0].endswith("†")
        cells = "".join(cell("td", n, "" if again and n in by else said) for n, said in enumerate(row))
        body.append(f'<tr class="{" ".join(marks)}">{cells}</tr>')
        before = row
    return f'<div class="wide"><table><thead><tr>{lines[0]}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def legend(lines: Sequence[str]) -> str:
    """What columns mean."""
    return '<ul class="legend">' + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"


def described(found: Sequence[Found]) -> Mapping[str, int]:
    """How many there are of each kind."""
    kinds = [one.kind for one in found]
    return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}

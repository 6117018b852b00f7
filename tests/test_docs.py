"""What the README and the pages of the docs show is what the code draws, prints and has measured."""

from __future__ import annotations

import doctest
import importlib
import inspect
import json
import math
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from docs.make import pictures, reference
from jax_ccm.benchmarks import pytorch, serving
from jax_ccm.benchmarks import report as speed
from jax_ccm.config import cli
from jax_ccm.config.schema import save_config
from jax_ccm.devices import report as device_report
from jax_ccm.errors import UserError
from jax_ccm.evals import comparison, parity, report, slots, stored
from jax_ccm.methods import METHODS, build
from jax_ccm.planning import ahead
from jax_ccm.planning import report as plan_report
from jax_ccm.rules.draw import draw
from jax_ccm.rules.examples import Example, Segment
from jax_ccm.sessions import typed
from jax_ccm.training.run import Run
from tests import cases, pretrained

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = sorted((ROOT / "docs" / "methods").glob("*.md"))
RESULTS = sorted((ROOT / "results").rglob("table.md"))
BENCHES = sorted((ROOT / "results").rglob("bench.json"))
SERVED = sorted((ROOT / "results" / "serving").rglob("serving.json"))
BESIDE_PYTORCH = sorted((ROOT / "results" / "pytorch").rglob("*.json"))
CHECKED = sorted(path for kind in ("gpu", "tpu") for path in (ROOT / "results" / kind).glob("*/"))
COMPILED = sorted((ROOT / "results" / "kernels").glob("*.json"))


def commands(text: str) -> set[str]:
    """The lines that start a command of the library with a config, each with what goes on behind a backslash."""
    text = re.sub(r"\s*\\\n[ #]*", " ", text)
    lines = re.findall(r"^(?:[#>]? *|.*Command: )python -m (jax_ccm[.a-z]* .*)$", text, re.MULTILINE)
    own = "train|evaluate|lm_eval|chat|serve|bench|verify|plan|benchmarks.pytorch|benchmarks.serving"
    return {line.split("  #")[0] for line in lines if re.match(rf"jax_ccm\.({own}) (configs/|runs/|smollm2)", line)}


def test_commands_are_read_as_they_stand(monkeypatch):
    """Whatever a page, a config or a card tells people to run: its options exist and go with its config."""
    texts = [README, *DOCS, *PAGES, *ROOT.glob("configs/*.yaml"), *ROOT.glob("adapters/*/README.md")]
    found = {(path.name, line) for path in texts for line in commands(path.read_text())}
    assert len(found) > 45
    monkeypatch.chdir(ROOT)

    class Read(Exception):
        pass

    def read(options, argv=None, *, command, parse=cli.parse):
        parse(options, argv, command=command)
        raise Read

    monkeypatch.setattr(cli, "parse", read)
    for page, line in sorted(found):
        name, config, *rest = shlex.split(line)
        # An adapter that a run will have made has that run's config; where it is anybody's, that of one that is there.
        if made := re.match(r"runs/([^/]+)/", config):
            config = f"configs/{made[1]}.yaml"
            config = config if Path(config).exists() else "smollm2-135m-concat"
        monkeypatch.setattr(sys, "argv", [name, config, *rest])
        try:
            importlib.import_module(name).main()
        except Read:
            continue
        except (SystemExit, UserError) as error:
            pytest.fail(f"{page}: {line}\n{error}")


@pytest.mark.parametrize("page", ["index", "tour", "library"])
def test_examples(page):
    known = {"tokenizer": pretrained.tokenizer()}
    result = doctest.testfile(str(ROOT / "docs" / f"{page}.md"), module_relative=False, extraglobs=known)
    assert result.attempted > 6 and result.failed == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the pages name: an adapter in two places, a config and a text; the base of both is tiny."""
    folder = tmp_path_factory.mktemp("pages")
    pretrained.make_base(folder / "base")
    config = pretrained.config(folder, cache={"memory_capacity": 64, "raw_capacity": 160})
    with Run(config, folder / "run") as run:
        run.train()
    for name in ("chat", "quickstart/smollm2"):
        shutil.copytree(folder / "run" / "adapter", folder / "runs" / name / "adapter")
    save_config(config, folder / "mine.yaml")
    (folder / "notes.txt").write_text("Clara lives in Lisbon. " * 20)
    return folder


@pytest.mark.parametrize("page", [README, ROOT / "docs" / "library.md"], ids=lambda page: page.stem)
def test_scripts(page, folder, monkeypatch):
    """Python that is no dialogue with the prompt, block after block."""
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    blocks = [block for block in blocks if ">>>" not in block]
    assert blocks
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    assert (folder / "clara.ccm").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_masks_are_drawn_by_the_code(page):
    drawn = re.findall(r"<!-- draw: (.*?) -->\n```text\n(.*?)\n```", page.read_text(), re.DOTALL)
    assert len(drawn) == page.read_text().count("<!-- draw:")
    for expression, picture in drawn:
        assert eval(f"draw({expression})", {"draw": draw, "build": build}) == picture


def test_the_precision_of_cpus_reads_as_float32_does():
    """`auto` may take it by itself: perplexity stays within 0.3 % at every time step, and the page says what it was."""
    found = {}
    for name in ("float32", "mixed"):
        results = json.loads((ROOT / "results" / "precision" / f"{name}.json").read_text())
        assert results["config"]["model"]["precision"] == name
        found[name] = {row["step"]: row["systems"]["full"]["perplexity"]["value"] for row in results["steps"]}
    assert list(found["mixed"]) == list(found["float32"]) == [1, 2, 4, 8, "all"]
    for step, perplexity in found["float32"].items():
        assert abs(found["mixed"][step] / perplexity - 1) < 0.003, step
    said = "perplexity {mixed:.3f} in `mixed` and {float32:.3f} in\n`float32`"
    assert (
        said.format(**{name: steps["all"] for name, steps in found.items()}) in (ROOT / "docs/running.md").read_text()
    )


def test_slots_by_formula():
    """The table of costs: what its formulas give is what sessions hold between turns."""
    page = (ROOT / "docs" / "methods" / "README.md").read_text()
    formulas = {
        (name, "online" in cell): formula
        for cell, formula in re.findall(r"^\| (`.*?) \| `(.*?)` \|", page, re.MULTILINE)
        for name in re.findall(r"`(\w+)`", cell)
        if name in METHODS
    }
    assert {name for name, _ in formulas} == set(METHODS) - {"streaming_llm"}, "whose slots are those of its stream"
    n, c, r, k, u, h, w = 3, 12, 4, 2, 5, 0.25, 30
    takes_n = [name for name, builder in METHODS.items() if "comp_tokens" in inspect.signature(builder).parameters]
    options: dict[str, dict[str, Any]] = {name: dict(comp_tokens=n) for name in takes_n} | {
        "compressive": dict(ratio=r, recent=k),
        "loma": dict(ratio=r, memory_tokens=c // r),
        "local": dict(hidden=h),
        "evict": dict(slots=n, sink=False),
        "window": dict(size=w),
    }
    for (name, online), formula in formulas.items():
        method = build(name, **options.get(name, {}), **({"online": True} if online else {}))
        keep = np.arange(c) < u if method.keeps_text and name in ("sentinel", "scattered") else None
        for t in (2, 3, 5):
            chunk = Segment(np.full(c, 7, np.int32), np.zeros(c, bool), keep)
            tail = Segment(np.full(1, 7, np.int32), np.ones(1, bool))
            session = Example(np.zeros(0, np.int32), np.zeros(0, np.int32), (chunk,) * t + (tail,))
            values = dict(t=t, n=n, c=c, r=r, k=k, u=u, h=h, w=w, ceil=math.ceil, min=min)
            assert slots.context_slots(method, session) == eval(formula, values), (name, t)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_page_and_a_line(name):
    """On a page of its own, or with its kin: a mask that is drawn, each option, what it costs, and how ours differs."""
    titles = {page: page.read_text().split("\n", 1)[0] for page in PAGES}
    (page,) = [page.read_text() for page, title in titles.items() if f"`{name}`" in title]
    for option in inspect.signature(METHODS[name]).parameters:
        assert f"`{option}`" in page, f"nothing is said of {option}"
    for part in ("\nMemory: ", "FLOPs", "**How ours differs.**"):
        assert part in page, part
    # The exponential mean hides what the mean hides.
    assert re.search(rf'<!-- draw: build\("{name}"', page) or name == "ccm_ema"
    assert f"`{name}`" in README.read_text()


def test_the_worked_example_of_a_new_method():
    """The file in CONTRIBUTING passes the common test as it stands, and is as short as a method should be."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    assert code.count("\n") < 100
    names: dict[str, Any] = {}
    exec(code, names)
    method, sessions, model = names["recent"](2), cases.sessions(((3, 2, 4, 2, 3, 2),)), cases.model(tokens=2)
    parallel, recurrent = (f(model, method, sessions)[0] for f in (parity.parallel_logits, parity.recurrent_logits))
    np.testing.assert_allclose(parallel, recurrent, atol=1e-5)
    whole = parity.parallel_logits(model, build("ccm_concat", comp_tokens=2), sessions)[0]
    assert np.abs(parallel - whole).max() > 1e-3


def rows(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("|")]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: str(path.parent.relative_to(ROOT / "results")))
def test_tables_are_made_of_the_numbers(path):
    made = {"results.json": report.markdown, "comparison.json": comparison.markdown}
    (found,) = [(path.parent / name, markdown) for name, markdown in made.items() if (path.parent / name).exists()]
    file, markdown = found
    numbers = stored.read(file)
    if "steps" not in numbers:  # of the lm-evaluation-harness
        pytest.importorskip("lm_eval", reason="the lm-evaluation-harness is not installed")
        from jax_ccm.harness import tasks

        numbers, markdown = numbers["systems"], tasks.table
    assert markdown(numbers) == path.read_text()


@pytest.mark.parametrize("folder", ["results/plan", "results/plan/one_gpu"])
def test_the_table_of_plans_is_made_of_the_plans(folder):
    plans = [json.loads(path.read_text()) for path in sorted((ROOT / folder).glob("*.json"))]
    assert plans, f"no plan is recorded in {folder}"
    made, kept = plan_report.overview(plans), (ROOT / folder / "overview.md").read_text()
    assert made == kept, f"python -m jax_ccm.plan overview {folder}"
    assert ("full context" in made) == any("sessions" in plan for plan in plans)


def test_the_hours_of_the_recipe_are_those_of_its_plans():
    """At half of the peak rate, for the steps of the config."""
    page = (ROOT / "docs" / "recipe.md").read_text()
    said = re.search(r"take 1\.5B (\S+) hours on an RTX 4090 and 7B (\S+) hours on an H100", page)
    plans = [
        json.loads((ROOT / "results/plan/one_gpu" / f"qwen2.5-{name}_training.json").read_text())
        for name in ("1.5b-instruct_rtx4090-1", "7b-instruct_h100-1")
    ]
    hours = [2 * x["training"]["step"]["seconds"]["roofline"] * x["config"]["train"]["steps"] / 3600 for x in plans]
    assert said.groups() == tuple(f"{x:.1f}" for x in hours)


@pytest.mark.parametrize("path", BENCHES, ids=lambda path: path.parent.name)
def test_tables_of_speed_are_made_of_the_numbers(path):
    results = json.loads(path.read_text())
    for name in speed.TABLES:
        assert speed.markdown(results, name) == (path.parent / f"{name}.md").read_text()


@pytest.mark.parametrize("path", COMPILED, ids=lambda path: path.stem)
def test_tables_of_kernels_are_made_of_the_numbers(path):
    assert ahead.markdown(json.loads(path.read_text())) == path.with_suffix(".md").read_text()


@pytest.mark.parametrize("folder", CHECKED, ids=lambda path: path.name)
def test_tables_of_devices_are_made_of_the_numbers(folder):
    assert (folder / "report.md").read_text() == device_report.markdown(device_report.found_in(folder))


@pytest.mark.parametrize("kind", ["TPU", "GPU"])
def test_the_status_says_when_a_device_was_last_checked(kind):
    (row,) = re.findall(rf"^\| {kind} \| (.*) \|$", README.read_text(), re.MULTILINE)
    assert device_report.status(ROOT / "results", kind.lower()) in row


@pytest.mark.parametrize("path", BESIDE_PYTORCH, ids=lambda path: path.stem)
def test_tables_beside_pytorch_are_made_of_the_numbers(path):
    results = json.loads(path.read_text())
    assert path.with_suffix(".md").read_text() == pytorch.table(results)
    for compared in results["comparisons"].values():  # both sides computed the same
        losses = [
            cell["loss"] for side in compared["sides"].values() for cell in side["steps"].values() if "loss" in cell
        ]
        assert max(losses) - min(losses) < 0.003 * min(losses)


@pytest.mark.parametrize("path", SERVED, ids=lambda path: path.parent.name)
def test_tables_of_sessions_are_made_of_the_numbers(path):
    assert path.with_suffix(".md").read_text() == serving.table(json.loads(path.read_text()))


def test_what_is_said_of_many_sessions_is_made_of_the_numbers():
    page = " ".join((ROOT / "docs" / "speed.md").read_text().split())
    cells = json.loads((ROOT / "results" / "serving" / "smollm2" / "serving.json").read_text())["cells"]
    rate = {(cell["sessions"], cell["turns"], name): found["turns_per_second"]
            for cell in cells for name, found in cell["systems"].items() if "rounds" in found}  # fmt: skip
    faster = lambda sessions, turns, ours, than: rate[sessions, turns, ours] / rate[sessions, turns, than]
    ours = ("merge", "concat, evicting")
    full = [faster(*at, name, "full") for at in ((16, 100), (1, 1000)) for name in ours]
    said = re.search(
        r"answers (\S+) times as many .*?, or (\S+) times .*? behind 1,000 turns (\S+) and (\S+) times", page
    )
    assert said.groups() == tuple(f"{x:.1f}" for x in full)
    said = re.search(r"A turn behind 1,000 costs (\S+) and (\S+) times what it costs behind 10\.", page)
    assert said.groups() == tuple(f"{rate[1, 10, name] / rate[1, 1000, name]:.2f}" for name in ours)
    said = re.search(r"kernels are (\S+) times .*? still (\S+) times .*? or (\S+) times as fast", page)
    theirs = [faster(1, 10, "llama.cpp", "merge"), *(faster(1, 100, "llama.cpp", name) for name in ours)]
    assert said.groups() == tuple(f"{x:.1f}" for x in theirs)
    said = re.search(r"constant size answers (\S+) times as many, or (\S+) times", page)
    assert said.groups() == tuple(f"{faster(16, 100, name, 'llama.cpp'):.1f}" for name in ours)
    assert all(faster(*at, "llama.cpp", "full") > 1 for at in ((1, 10), (16, 10), (64, 10), (1, 100), (16, 100)))


def test_what_is_said_of_the_turn_from_which_a_memory_is_faster():
    page = (ROOT / "docs" / "speed.md").read_text()
    cells = json.loads((ROOT / "results" / "serving" / "smollm2_one_session" / "serving.json").read_text())["cells"]
    rate = {cell["turns"]: {name: x["turns_per_second"] for name, x in cell["systems"].items()} for cell in cells}
    first = lambda name: min(turns for turns, found in rate.items() if found[name] > found["llama.cpp"])
    said = re.search(r"from (\d+) turns on, the newest 512 slots and four slots of every turn from (\d+) on", page)
    assert [int(x) for x in said.groups()] == [first("merge"), first("concat, evicting")]
    assert first("concat") == first("concat, evicting")
    said = re.search(r"Behind 300 turns a memory of four slots answers (\S+) times as many", page)
    assert said[1] == f"{rate[300]['merge'] / rate[300]['llama.cpp']:.1f}"


def test_what_is_said_of_256_sessions():
    page = (ROOT / "docs" / "speed.md").read_text()
    cells = json.loads((ROOT / "results" / "serving" / "smollm2_256_sessions" / "serving.json").read_text())["cells"]
    systems = {cell["turns"]: cell["systems"] for cell in cells}
    assert "needs_bytes" in systems[100]["full"] and "needs_bytes" not in systems[10]["full"]
    said = re.search(r"four slots in all answer (\S+) turns a second behind 1,000 turns, and (\S+) behind 10\.", page)
    assert said.groups() == tuple(f"{systems[turns]['merge']['turns_per_second']:.1f}" for turns in (1000, 10))


def test_what_is_said_of_the_adapter_that_ships():
    folder = ROOT / "results" / "recipe"

    def right(name: str, questions: int) -> dict[str, str]:
        systems = json.loads((folder / name).read_text())["steps"][-1]["systems"]
        return {x: f"{questions * systems[x]['accuracy']['mean']['value']:.0f}" for x in ("memory", "full")}

    names = ("chat_spread_more", "chat_spread", "chat_wide")
    now, last, before = (right(f"{name}/results.json", 96) for name in names)
    said = re.search(r"finds (\d+) of 96 facts .*? where full context finds (\d+)", README.read_text())
    assert said.groups() == (now["memory"], now["full"])
    said = re.search(r"gives the right one away in\s(\d+) of 96", (ROOT / "docs" / "serving.md").read_text())
    assert said[1] == now["memory"]
    page = " ".join((ROOT / "docs" / "results.md").read_text().split())
    said = re.search(r"in (\d+) of 96 questions, where full context does in (\d+), .*? exchange had (\d+) right", page)
    assert said.groups() == (now["memory"], now["full"], before["memory"])
    assert f"on the test questions above {last['memory']} became {now['memory']}" in page
    rows = []
    for name in names[::-1]:
        row = json.loads((folder / "validation_varied" / f"{name}.json").read_text())["steps"][-1]
        share = "{:.0f} ± {:.0f} %".format(*(100 * row["content_share"][key] for key in ("value", "error")))
        perplexity = row["systems"]["memory"]["perplexity"]["value"]
        chosen = right(f"validation_varied/{name}.json", 72)
        rows.append(f"(`{name}.json`) | {perplexity:.1f} | {share} | {chosen['memory']} |")
    assert all(row in page.replace("**", "") for row in rows), rows
    assert f"| 100 % | {chosen['full']} |" in page
    runs = json.loads((ROOT / "adapters" / "smollm2-135m-concat" / "adapter.json").read_text())["extra"]["runs"]
    tokens, scored = (sum(run[key] for run in runs) for key in ("tokens", "scored_tokens"))
    assert f"{tokens:,} tokens, {scored:,} of them scored, in three pieces" in page


def test_what_is_said_of_facts_told_a_hundred_turns_ago():
    page = " ".join((ROOT / "docs" / "results.md").read_text().split())
    row = json.loads((ROOT / "results" / "recipe" / "chat_far" / "results.json").read_text())["steps"][-1]
    cells = {name: row["systems"][name] for name in ("memory", "full", "none")}
    right = {name: f"{200 * cell['accuracy']['mean']['value']:.0f}" for name, cell in cells.items()}
    wrong = f"{200 * cells['memory']['wrong']['accuracy']['mean']['value']:.0f}"
    number = r"(\d+(?:,\d+)*)"
    said = re.search(
        rf"{number} slots instead of {number}, chooses {number} of 200 right where full context chooses {number}; with "
        rf"another conversation's memory {number} are right and without any context {number}",
        page,
    )
    slots = [f"{cells[name]['kv_slots']:,.0f}" for name in ("memory", "full")]
    assert [*said.groups()] == [*slots, right["memory"], right["full"], wrong, right["none"]] and row["examples"] == 200
    said = re.search(r"earlier, (\d+) of 200 told a hundred turns ago \((\d+);", README.read_text())
    assert said.groups() == (right["memory"], right["full"])


def systems_of(name: str, step: object = "all") -> tuple[dict, dict]:
    """The row of a step of results, and its systems."""
    rows = json.loads((ROOT / "results" / name / "results.json").read_text())["steps"]
    (row,) = [row for row in rows if row["step"] == step]
    return row, row["systems"]


def right_of(cell: dict, questions: int) -> str:
    return f"{questions * cell['accuracy']['mean']['value']:.0f}"


def share_of(estimate: dict) -> str:
    return f"{100 * estimate['value']:.0f} ± {100 * estimate['error']:.0f} %"


def test_what_is_said_of_dialogues_with_slots_where_the_text_is():
    page = " ".join((ROOT / "docs" / "results.md").read_text().split())
    rows = {step: systems_of("dialog/spread_more", step) for step in (2, 4, 8, 12, "all")}
    assert all(found["memory"]["kv_bytes"] < found["full"]["kv_bytes"] / 5 for _, found in rows.values())
    share = {step: share_of(row["content_share"]) for step, (row, _) in rows.items()}
    said = f"the memory holds {share['all']} of what the base knows of a dialogue from its text"
    assert said in page and f"{share[8]} at t = 8 and {share[12]} at t = 12; of all 166 dialogues" in page
    assert rows[8][0]["examples"] + rows[12][0]["examples"] == 166
    known = {}
    for name in ("memory", "full"):
        gains = [(row["tokens"], found[name]["wrong"]["nll"]["value"] - found[name]["nll"]["value"])
                 for row, found in (rows[8], rows[12])]  # fmt: skip
        known[name] = sum(tokens * gain for tokens, gain in gains)
    assert f"of t = 8 and more together {100 * known['memory'] / known['full']:.0f} %." in page
    closed = {step: share_of(rows[step][0]["gap_closed_to_full_lora"]) for step in (8, "all")}
    assert f"knows it holds {share_of(rows['all'][0]['content_share_to_full_lora'])}, and of the gap" in page
    assert f"it closes {closed['all']} at all t and {closed[8]} at t = 8" in page
    assert f"holds [{share['all'].split()[0]} %]" in README.read_text()


def test_what_is_said_of_conversations_beyond_the_positions():
    page = " ".join((ROOT / "docs" / "results.md").read_text().split())
    row, found = systems_of("recipe/chat_endless")
    memory = found["memory"]
    near = [systems_of("recipe/chat_endless", age)[1]["memory"] for age in (2, 3, 4)]
    said = f"{right_of(memory, 48)} of 48 are right (behind the memory of another conversation "
    said += f"{right_of(memory['wrong'], 48)}); of what was told two to four exchanges (up to eight turns) before, "
    assert row["examples"] == 48 and said + f"{sum(int(right_of(cell, 12)) for cell in near)} of 36." in page
    short = systems_of("recipe/chat_endless_short")[1]["memory"]
    near = [systems_of("recipe/chat_endless_short", age)[1]["memory"] for age in (2, 3, 4)]
    said = f"it is {right_of(short, 48)} of 48, and {sum(int(right_of(cell, 12)) for cell in near)} of 36."
    assert said in page
    row, found = systems_of("recipe/chat_endless_before")
    said = f"of the first 24 of these questions {right_of(found['memory'], 24)} were right, with a perplexity of "
    assert said + f"{found['memory']['perplexity']['value']:.0f} (" in page and row["examples"] == 24
    cells = [systems_of("recipe/chat_spread_constant", age)[1]["memory"] for age in (1, 4)]
    said = f"knows as the growing memory does: {sum(int(right_of(cell, 24)) for cell in cells)} of 48 choices right"
    assert said in page


def test_what_is_said_of_questions_told_otherwise_and_in_a_closed_loop():
    page = " ".join((ROOT / "docs" / "results.md").read_text().split())
    row, found = systems_of("recipe/handwritten/chat_spread_more_exchanged")
    told, otherwise = ([right_of(cell(found[name]), 65) for name in ("memory", "full")]
                       for cell in (lambda x: x, lambda x: x["wrong"]))  # fmt: skip
    assert f"prefers the right answer in {told[0]} of 65 questions; told otherwise, in none" in page
    assert otherwise[0] == "0" and f"The base with all the text goes from {told[1]} to {otherwise[1]}." in page
    other = systems_of("recipe/handwritten/chat_spread_more")[0]["content_share"]
    said = f"(content share {share_of(row['content_share'])}; behind another conversation's memory {share_of(other)},"
    assert said in page and row["examples"] == 65
    held = {name: systems_of(f"recipe/handwritten/chat_spread_more{name}")[1]["memory"] for name in ("", "_closed")}
    assert right_of(held[""], 65) == right_of(held["_closed"], 65)
    perplexity = [f"{held[name]['perplexity']['value']:.2f}" for name in ("_closed", "")]
    contains = [f"{100 * held[name]['replies']['contains']['value']:.0f}" for name in ("_closed", "")]
    said = (
        f"{right_of(held['_closed'], 65)} of 65 choices are right as before, perplexity is {perplexity[0]} instead of "
    )
    assert said + f"{perplexity[1]}, and {contains[0]} % of its replies hold the answer ({contains[1]})" in page
    went = json.loads((ROOT / "results/recipe/handwritten/chat_spread_more_closed/rollout.json").read_text())
    assert f"({went['replies']} of up to 32 tokens, {went['cut']} of them cut off there)" in page


def test_what_is_said_of_arms():
    page = (ROOT / "docs" / "history.md").read_text()
    folder = ROOT / "results" / "recipe" / "arms"
    named = {
        "one for every six (`": "one_for_six_tokens_mean",
        "each seeing the whole exchange": "one_for_six_tokens_mean_whole_chunk",
        "with attention drawn to what it gives": "one_for_six_tokens_mean_alignment",
    }
    for words, name in named.items():
        records = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        (loss,) = [each["loss"] for each in records if each["step"] == 50 and "loss" in each]
        (validation,) = [each["validation_loss"] for each in records if "validation_loss" in each]
        (row,) = [line for line in page.splitlines() if line.startswith("|") and words in line]
        assert [cell.split(",")[0].strip() for cell in row.split("|")[3:5]] == [f"{loss:.2f}", f"{validation:.2f}"]


def test_what_is_said_of_continuations():
    page = (ROOT / "docs" / "results.md").read_text()
    folder = ROOT / "results" / "text" / "continued"
    rows = [line for line in (folder / "table.md").read_text().splitlines() if line.startswith("|")]
    assert "\n".join(rows[:6]) + "\n" in page and "\n".join(rows[6:]) + "\n" in page
    found = json.loads((folder / "comparison.json").read_text())
    cells = {name: runs[0]["steps"][-1] for name, runs in found["systems"].items()}
    judged = {name: f"{cell['continuations']['judge_perplexity']['value']:.0f}" for name, cell in cells.items()}
    page = " ".join(page.split())
    assert f"perplexity of {judged['sentinel']}, those of local and scattered attention {judged['local']} and" in page
    assert f"{judged['scattered']} (full context {judged['full context']}, what people wrote" in page
    alike = [cells[name]["continuations"]["similarity"]["value"] for name in ("sentinel", "full context")]
    assert f"(similarity {alike[0]:.2f} of {alike[1]:.2f})" in page
    read = [f"{cells[name]['perplexity']['value']:.1f}" for name in ("sentinel", "full context")]
    assert f"nearly full context's ({read[0]} of {read[1]})" in page
    more = [cells["sentinel"]["kv_slots"] / cells[name]["kv_slots"] for name in ("local", "scattered")]
    assert all(1.09 < each < 1.13 for each in more) and "hold a tenth more slots" in page


def test_what_is_said_of_memory_tokens_that_begin_as_means():
    page = " ".join((ROOT / "docs" / "results.md").read_text().split())
    folder = ROOT / "results" / "text" / "loma"
    cell = json.loads((folder / "c4_start_mean.json").read_text())["steps"][0]["systems"]["memory"]
    systems = json.loads((folder / "comparison.json").read_text())["systems"]
    before = systems["loma-4"][0]["steps"]["text"]
    back = [f"{100 * each['repetition']['token']['value']:.0f}" for each in (cell, before)]
    read = [f"{each['perplexity']['value']:.1f}" for each in (cell, before)]
    assert f"say {back[0]} % back instead of {back[1]}, still no whole chunk" in page
    assert cell["repetition"]["exact"]["value"] == 0
    assert f"read a little worse ({read[0]} instead of {read[1]})" in page


def test_what_is_said_of_labels_from_demonstrations():
    page = " ".join((ROOT / "docs" / "results.md").read_text().split())
    steps = json.loads((ROOT / "results" / "icl" / "results.json").read_text())["steps"]
    right = {row["step"]: [] for row in steps}
    for row in steps:
        for name in ("memory", "full", "none"):
            accuracy = row["systems"][name]["accuracy"]["mean"]["value"]
            right[row["step"]].append(f"{row['examples'] * accuracy:.0f}")
    said = re.search(
        r"the memory has (\d+) and (\d+) of 32 right, full context (\d+) and (\d+), no context (\d+) and (\d+):", page
    )
    pairs = zip(right["customer_review"], right["tweet_stance_abortion"], strict=True)
    assert list(said.groups()) == [number for pair in pairs for number in pair]
    said = re.search(r"(\d+) of 360 are right, full context has (\d+) and no context (\d+);", page)
    assert list(said.groups()) == right["all"] and steps[-1]["examples"] == 360
    lines = [json.loads(line) for line in (ROOT / "results" / "icl" / "train.jsonl").read_text().splitlines()]
    losses = [f"{line['validation_loss']:.2f}" for line in lines if "validation_loss" in line]
    assert "fell from {} after 60 steps to {} and {} after 120 and 180".format(*losses) in page
    assert f"{lines[-2]['tokens']:,} tokens, {lines[-2]['scored_tokens']:,} of them scored, 40 minutes" in page


def test_the_table_of_questions_by_hand_is_made_of_the_numbers():
    """Of three evaluations, which no command puts beside each other."""
    folder = ROOT / "results" / "recipe" / "handwritten"
    systems = {
        name: json.loads((folder / name / "results.json").read_text())["steps"][-1]["systems"]
        for name in ("chat_spread_more", "chat_spread", "chat_wide")
    }

    def row(cell) -> list[str]:
        said = [cell["replies"][key]["value"] for key in ("exact", "f1", "contains")]
        own = [f"{cell['accuracy']['mean']['value']:.2f}", f"{cell['perplexity']['value']:.1f}"]
        return own + [f"{value:.2f}" for value in said]

    now = systems["chat_spread_more"]
    before = [row(systems[name]["memory"]) for name in ("chat_wide", "chat_spread")]
    wanted = [row(now["none"]), row(now["full"]), *before, row(now["memory"])]
    wanted[-1][-1] += f" (wrong memory {now['memory']['wrong']['replies']['contains']['value']:.2f})"
    page = (ROOT / "docs" / "results.md").read_text()
    table = re.search(r"\| \| choices right \|.*\n\|.*\n((?:\|.*\n)+)", page)[1].replace("*", "")
    assert [[cell.strip() for cell in line.split("|")[2:-1]] for line in table.splitlines()] == wanted


def test_the_table_of_ratios_is_made_of_the_numbers():
    """Of three evaluations on validation."""
    page = (ROOT / "docs" / "results.md").read_text()
    cells = lambda line: [cell.strip() for cell in line.split("|")[1:-1]]
    shown = re.search(r"\| tokens a slot \|.*\n\|.*\n((?:\|.*\n)+)", page)[1]
    *ratios, full = map(cells, shown.splitlines())
    for label, *said in ratios:
        ratio, name = re.fullmatch(r"(\d+) \(`(\w+)\.json`\)", label).groups()
        found = json.loads((ROOT / "results" / "recipe" / "validation_varied" / f"{name}.json").read_text())
        row, share = found["steps"][-1], found["steps"][-1]["content_share"]
        assert f"one for {ratio} of text" in found["memory"]

        def measured(system, share, row=row):
            cell, slots = row["systems"][system], row["systems"]["full"]["kv_slots"]
            perplexities = f"{cell['perplexity']['value']:.1f} ({cell['wrong']['perplexity']['value']:.1f})"
            right = f"{72 * cell['accuracy']['mean']['value']:.0f}"
            return [f"{cell['kv_slots']:.0f}", f"{cell['kv_slots'] / slots:.0%}", perplexities, share, right]

        assert said == measured("memory", f"{100 * share['value']:.0f} ± {100 * share['error']:.0f} %")
        assert full[1:] == measured("full", "100 %")
    steps = [
        json.loads((ROOT / "results" / "recipe" / name / "results.json").read_text())["steps"][-1]["systems"]
        for name in ("chat_spread_ratio4", "chat_spread", "handwritten/ratio4", "handwritten/chat_spread")
    ]
    right = [f"{96 * cell['accuracy']['mean']['value']:.0f}" for cell in (x["memory"] for x in steps[:2])]
    full = f"{96 * steps[0]['full']['accuracy']['mean']['value']:.0f}"
    assert "the memory has {} right at four tokens a slot ({} at six, full context {})".format(*right, full) in page
    said = [f"{100 * cell['memory']['replies']['contains']['value']:.0f}" for cell in steps[2:]]
    assert "answer in {} % ({} at six;".format(*said) in page


def test_the_table_of_who_sees_what_is_made_of_the_numbers():
    """Of five evaluations; and what is said below it of the sixth."""
    folder = ROOT / "results" / "recipe" / "among_slots"
    page = (ROOT / "docs" / "history.md").read_text()
    cells = lambda line: [cell.strip() for cell in line.split("|")[1:-1]]
    steps = lambda name: json.loads((folder / name / "results.json").read_text())["steps"]
    # By age: content shares as the table has them.
    shares = lambda name: {
        row[0].split()[0]: row[10] for row in map(cells, rows((folder / name / "table.md").read_text()))
    }

    def measured(step) -> tuple[str, str, float]:
        memory = step["systems"]["memory"]
        value = memory["perplexity"]["value"]
        behind = f"{value:.1f} ({memory['wrong']['perplexity']['value']:.1f})"
        return behind, f"{value:.1f}", memory["accuracy"]["mean"]["value"]

    shown = re.search(r"\| \| 1 exchange ago: .*\n\|.*\n((?:\|.*\n)+)", page)[1]
    for label, *found in map(cells, shown.splitlines()):
        name = re.search(r"\(`(\w+)`\)", label)[1]
        (one, _, first), (four, _, second) = map(measured, steps(name)[:2])
        expected = [one, shares(name)["1"], four, shares(name)["4"], f"{24 * (first + second):.0f}"]
        assert found == expected, name
    said = re.search(
        r"perplexity is (\S+) instead of (\S+), .* (\S+) instead of (\S+ ± \S+ %), and (\d+) choices .* of (\d+)",
        page,
    )
    (_, reader, right), (_, without, before) = (measured(steps(name)[-1]) for name in ("reader", "all_slots"))
    assert said.group(1, 2) == (reader, without) and said[4] == shares("all_slots")["all"]
    assert said[3] in shares("reader")["all"] and [int(x) for x in said.group(5, 6)] == [
        round(72 * x) for x in (right, before)
    ]


def test_the_table_of_kinds_is_made_of_the_numbers():
    """Of four evaluations, which no command puts beside each other."""
    folder, page = ROOT / "results" / "recipe", (ROOT / "docs" / "history.md").read_text()
    cells = lambda line: [cell.strip() for cell in line.split("|")[1:-1]]

    def measured(name: str, system: str) -> list[str]:
        cell = json.loads((folder / name / "results.json").read_text())["steps"][-1]["systems"][system]
        table = map(cells, rows((folder / name / "table.md").read_text()))
        share = next(row[10] for row in table if row[0] == "all") if system == "memory" else "100 %"
        perplexities = f"{cell['perplexity']['value']:.2f} ({cell['wrong']['perplexity']['value']:.2f})"
        return [perplexities, f"{72 * cell['accuracy']['mean']['value']:.0f}", share]

    runs = {"ships": ("training_kinds/ships", "among_slots/all_slots"), "eight": ("training_kinds/ratio", "chat_ratio")}
    expected = [[*measured(runs["ships"][0], "full"), *measured(runs["ships"][1], "full")]]
    expected += [[*measured(trained, "memory"), *measured(other, "memory")] for trained, other in runs.values()]
    shown = re.search(r"\| \| training kinds: .*\n\|.*\n((?:\|.*\n)+)", page)[1]
    assert [cells(line)[1:] for line in shown.splitlines()] == expected


def test_what_is_said_of_saying_exchanges_again():
    page, folder = (ROOT / "docs" / "history.md").read_text(), ROOT / "results" / "recipe"
    part = page.partition("**Saying closed exchanges again in training**")[2].partition("\n\n")[0].replace("\n", " ")
    run = json.loads((folder / "chat_repeat" / "train_summary.json").read_text())
    assert part.count(f"{run['tokens']:,} tokens") == 1
    lines = [json.loads(line) for line in (folder / "chat_repeat" / "train_repeat.jsonl").read_text().splitlines()]
    losses = [f"{line['validation_loss']:.3f}" for line in lines if line.get("validation_loss")]
    assert f"{', '.join(losses[:-1])} and {losses[-1]} after" in part
    cell = json.loads((folder / "chat_repeat" / "results.json").read_text())["steps"][-1]["systems"]["memory"]
    before = json.loads((folder / "validation_varied" / "chat_wide.json").read_text())["steps"][-1]["systems"]["memory"]
    perplexities = [f"{x['perplexity']['value']:.1f}" for x in (cell, before)]
    assert "perplexity is {} instead of {},".format(*perplexities) in part
    right = {f"{72 * x['accuracy']['mean']['value']:.0f}" for x in (cell, before)}
    assert right == {"40"} and "40 choices are right as before" in part


def test_what_is_said_of_kinds_of_questions():
    part = (ROOT / "docs" / "history.md").read_text().partition("**What long memories get wrong**")[2]
    steps = json.loads((ROOT / "results" / "recipe" / "chat_tasks" / "results.json").read_text())["steps"]
    right = {
        (row["step"], name): round(row["examples"] * row["systems"][name]["accuracy"]["mean"]["value"])
        for row in steps
        for name in ("full", "memory")
    }
    assert right["needle", "full"] == right["needle", "memory"] == 22 and "(22 of 24 right, both)" in part
    changed = "right in {} of 24, and the memory in {}, which".format(
        *(right["updates", x] for x in ("full", "memory"))
    )
    assert changed in part
    marked = sum(line.startswith("| ") and " † |" in line for line in part.partition("!" + "[right")[0].splitlines())
    assert marked == 4


def test_pages_show_the_tables():
    shown = [
        (page, name, table)
        for page in (README, *DOCS)
        for name, table in re.findall(r"<!-- table: (\S+) -->\n((?:\|.*\n)+)", page.read_text())
    ]
    assert {page.stem for page, _, _ in shown} >= {"README", "kernels", "planning", "results", "speed"}
    for page, name, table in shown:
        assert rows(table) == rows((ROOT / name).read_text()), f"the copy of {name} in {page} is old"


def test_the_readme_shows_what_was_said():
    """Of the recorded example, as the command prints it; and how many of its answers hold what was told."""
    page = README.read_text()
    (found,) = re.findall(r"<!-- said: (\S+) (\d+) (\d+) -->\n```text\n(.*?)\n```", page, re.DOTALL)
    name, first, end, shown = found
    record = json.loads((ROOT / name).read_text())
    assert [entry["you"] for entry in record] == typed.example(), "the example has changed since"
    lines = []
    for entry in record[int(first) : int(end)]:
        lines += [f"you      {entry['you']}"]
        for source, answer in entry["compared"].items():
            lines.append(f"{source:8}{answer['bytes'] / 2**20:6.2f} MiB  {answer['reply']}")
    plain = lambda text: [line.removesuffix(" ...") for line in text if line]
    assert plain(shown.splitlines()) == lines
    told = ("Leila", "Bristol", "welder", "Samir", "Waffles", "nine", "4071")
    right = dict.fromkeys(("memory", "full"), 0)
    for answer, entry in zip(told, record[12:], strict=True):
        for source in right:
            right[source] += answer in entry["compared"][source]["reply"]
    words = ["none", "one", "two", "three", "four", "five", "six", "seven"]
    assert f"the memory gets {words[right['memory']]} right, full context {words[right['full']]}" in page


def test_pictures_are_made_of_the_numbers(tmp_path):
    """Their words and numbers; how lines are drawn is a matter of matplotlib's version."""
    pictures.main(tmp_path)
    words = lambda folder, name: re.findall(r"<text[^>]*>(.*?)</text>", (folder / name).read_text())
    for name in pictures.PICTURES:
        made = words(tmp_path, name)
        assert len(made) > 8 and made == words(ROOT / "docs" / "pictures", name), "python -m docs.make.pictures"


@pytest.mark.parametrize("name", reference.PAGES)
def test_the_reference_is_made_of_the_code(name):
    made = reference.PAGES[name]()
    assert made == (ROOT / "docs" / name).read_text(), "python -m docs.make.reference"


def test_the_readme_is_short():
    text = README.read_text()
    assert text.count("\n") <= 150 and len(text.split()) <= 1800, (text.count("\n"), len(text.split()))


@pytest.mark.parametrize(
    "page", [README, ROOT / "CONTRIBUTING.md", *DOCS, *PAGES], ids=lambda path: str(path.relative_to(ROOT))
)
def test_links_lead_somewhere(page):
    """Links and pictures of a page, relative to it, and headings that they name; nothing outside the repository."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    heading = lambda line: re.sub(r"[^\w\- ]", "", line.lower()).strip().replace(" ", "-")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in map(heading, re.findall(r"(?m)^#+ (.*)$", file.read_text())), target

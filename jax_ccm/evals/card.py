"""The model card of an adapter: ``README.md`` as hubs expect it, made of what files say and of nothing else."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_ccm.errors import UserError
from jax_ccm.evals import report, stored
from jax_ccm.evals.cells import STYLE, name_of, name_of_steps
from jax_ccm.records import output
from jax_ccm.records.card import CardConfig
from jax_ccm.rules.describe import label
from jax_ccm.weights.lora import Lora

FILE = "README.md"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def read_results(path: Path) -> dict[str, Any]:
    """What an evaluation wrote to its ``results.json``.

    Raises:
      UserError: if the file holds something else.
    """
    found = stored.read(path)
    steps = found.get("steps")
    if not (isinstance(steps, list) and steps and all(isinstance(row, dict) and "systems" in row for row in steps)):
        raise UserError(f"{path} holds no results of jax_ccm.evaluate; give the results.json of its --workdir")
    return found


def write(folder: Path, name: str, adapter: Lora, **about: Any) -> None:
    """Writes the `model_card` of an adapter into a folder; arguments as for it."""
    (folder / FILE).write_text(model_card(name, adapter, **about), encoding="utf-8")


def model_card(
    name: str,
    adapter: Lora,
    *,
    recipe: Mapping[str, Any] | None,
    said: CardConfig,
    results: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The card of an adapter, in the order of PEFT's.

    Args:
      name: what it is called.
      adapter: with what was saved beside it: its method, its base, and the runs that trained it.
      recipe: what the config that it was trained with says beyond the defaults; None if it is not known.
      said: what a person says of it.
      results: of evaluations (`read_results`).
    """
    recipe = recipe or {}
    parts = [
        f"---\n{_front_matter(adapter, recipe, said)}\n---",
        f"# {name}",
        said.description,
        "## Model Details",
        _details(adapter, recipe, said),
        "## How to Get Started with the Model",
        _start(name, recipe),
        "## Training Details",
        *_training(adapter, recipe, said),
        "## Evaluation",
        *(_evaluation(results) or ["Not measured."]),
        "## Bias, Risks, and Limitations",
        said.limits,
        "A memory holds less than the text that it was made of: names and numbers may be lost or mixed up. The adapter "
        "serves the weights of its base alone, and what holds for that model holds here.",
    ]
    text = "\n\n".join(part for part in parts if part) + "\n"
    # The name of a folder need not be UTF-8, and a card is.
    return text.encode("utf-8", "backslashreplace").decode()


def _base_model(recipe: Mapping[str, Any], said: CardConfig) -> str:
    """Id of the base on the hub; empty if none is known."""
    source = recipe.get("model", {}).get("source", "")
    # What lies on this machine is no id of the hub, even if it looks like one.
    return said.base_model or (source if _HUB_ID.fullmatch(source) and not Path(source).exists() else "")


def _front_matter(adapter: Lora, recipe: Mapping[str, Any], said: CardConfig) -> str:
    from huggingface_hub import ModelCardData

    base, method = _base_model(recipe, said), (adapter.method or {}).get("name")
    tags = ["jax", "flax", "lora", "context-compression", *([method] if method else [])]
    return ModelCardData(
        base_model=base or None,
        library_name="jax_ccm",
        license=said.license or None,
        # The hub lists an adapter under its base by this tag.
        tags=[*tags, *([f"base_model:adapter:{base}"] if base else [])],
        datasets=list(said.datasets) or None,
    ).to_yaml()


def _details(adapter: Lora, recipe: Mapping[str, Any], said: CardConfig) -> str:
    base, shape = adapter.base or {}, adapter.config
    lora = (
        f"LoRA of rank {shape.rank}, alpha {shape.alpha:g}, on {', '.join(shape.targets)}" if shape.rank else "no LoRA"
    )
    numbers = sum(x.size for x in adapter.arrays.values())
    of = f"`{base.get('name', '?')}` (fingerprint {base.get('fingerprint', '?')})" if base else "not recorded"
    lines = {
        "Base model": f"{of}; on the hub {_base_model(recipe, said)}" if _base_model(recipe, said) else of,
        "Method": label(adapter.method) if adapter.method else "not recorded",
        "Adapter": f"{lora}; {shape.tokens} compression tokens; {numbers:,} numbers",
        "License": said.license or "not given",
    }
    return "\n".join(f"- **{what}:** {text}" for what, text in lines.items())


def _start(name: str, recipe: Mapping[str, Any]) -> str:
    if not recipe:
        return (
            "The config that it was trained with is not recorded: `python -m jax_ccm.chat CONFIG.yaml --adapter PATH`."
        )
    return (
        f'```python\nimport jax_ccm\n\nccm = jax_ccm.from_pretrained("{name}")  # base=PATH if the base is elsewhere\n'
        'talk = ccm.conversations(rows=1)\ntalk.say({0: "Hi, I am Clara."}, max_tokens=48)\n```\n\n'
        f"or `python -m jax_ccm.chat {name}`. The name may be that of an adapter of the library, a folder, or a hub id."
    )


def _training(adapter: Lora, recipe: Mapping[str, Any], said: CardConfig) -> list[str]:
    parts = ["### Training Data"]
    sources = recipe.get("data", {}).get("train", [])
    parts += ["\n".join(f"- `{source}`" for source in sources) or "Not recorded.", said.data]
    parts += ["### Training Procedure", _runs(adapter.extra.get("runs", []))]
    # How it is evaluated is told with the results; what a person says of it stands in the card itself.
    rest = {section: keys for section, keys in recipe.items() if section not in ("card", "eval")}
    if rest:
        text = output.yaml_text(rest).rstrip()
        parts += ["What `config.yaml` says beyond the defaults:", f"```yaml\n{text}\n```"]
    return parts


def _runs(runs: Sequence[Mapping[str, Any]]) -> str:
    """A row for each run that led to the adapter, and their sums."""
    if not runs:
        return "Tokens, time and hardware are not recorded."
    header = ["run", "steps", "tokens seen", "of these scored", "hours", "seed", "precision", "hardware"]

    def hours(seconds):
        return f"{seconds / 3600:.2f}"

    rows = [
        [str(number), f"{run['steps']:,}", f"{run['tokens']:,}", f"{run['scored_tokens']:,}", hours(run["seconds"]),
         str(run["seed"]), run["precision"], run["hardware"]]
        for number, run in enumerate(runs, 1)
    ]  # fmt: skip
    if len(runs) > 1:

        def total(key):
            return sum(run[key] for run in runs)

        sums = [f"{total(key):,}" for key in ("steps", "tokens", "scored_tokens")]
        rows.append(["all", *sums, hours(total("seconds")), "", "", ""])
    last = ", ".join(f"{package} {version}" for package, version in runs[-1]["versions"].items())
    lines = [output.table(header, rows), f"Software of the last run: {last}."]
    if runs[0].get("started_from"):
        lines.append(f"The first started from `{runs[0]['started_from']}`, of whose training nothing is recorded.")
    return "\n\n".join(lines)


def _evaluation(results: Sequence[Mapping[str, Any]]) -> list[str]:
    parts = []
    for found in results:
        data = found["data"]
        sources = ", ".join(f"`{source}`" for source in data["sources"])
        parts += [
            f"### {found['title']}, {data['split']}",
            f"Data: {sources}; {data['report']}. Run on {found['device']}.",
            report.markdown(found).strip(),
            "Perplexity, 95 % intervals (bootstrap over dialogues):",
            _intervals(found),
        ]
    return parts


def _intervals(results: Mapping[str, Any]) -> str:
    steps = results["steps"]
    names = [name for name in STYLE if name in steps[0]["systems"]]

    def between(cell):
        return "{:,.2f} to {:,.2f}".format(*cell["ci95"]) if cell.get("ci95") else "-"

    rows = [[name_of(row), *(between(row["systems"][name]["perplexity"]) for name in names)] for row in steps]
    return output.table([name_of_steps(results)[0], *(STYLE[name][1] for name in names)], rows)

"""Methods as JSON values, for the files that name the method they belong to, and in a few words for people."""

from __future__ import annotations

import dataclasses
import enum
import re
import sys
from typing import Any

from jax_ccm.rules.types import INF, Method, Rule


def describe_method(method: Method) -> dict[str, Any]:
    """A method as JSON values, independent of how its rule happens to be written.

    The rule becomes ``"sees"``: for each "KIND sees KIND" the distances in segments, as merged ``[nearest, farthest]``
    intervals (None for no limit).
    """
    found: dict[str, list[list[int]]] = {}
    for clause in method.rule.sees:
        limit = f" within {clause.window}" * (clause.window is not None)
        if clause.hidden is not None:
            limit += f" but the oldest {clause.hidden[0]}/{clause.hidden[1]}"
        limit += " up to its position" * clause.behind
        for query in clause.query:
            for key in clause.key:
                found.setdefault(f"{query.name} sees {key.name}{limit}", []).append([clause.nearest, clause.farthest])
    sees = {name: _merged(spans) for name, spans in sorted(found.items())}
    out: dict[str, Any] = {"name": method.name, "sees": sees}
    out |= {"both_ways": sorted(k.name for k in method.rule.both_ways)}
    for field in dataclasses.fields(method):
        if field.name not in ("name", "rule"):
            out[field.name] = _plain(getattr(method, field.name))
    # Sets, of which the order says nothing.
    return out | {"writes": sorted(out["writes"]), "gate": sorted(out["gate"])}


# What fields of a description, and of its tokens, were called before.
_RENAMED = {"keep": "eviction", "fewest": "min_comp_tokens"}
_RENAMED_OF_TOKENS = {"row": "embedding_index"}


def upgraded(stored: dict[str, Any], where: str) -> dict[str, Any]:
    """A description from a file of any version under the names of this one, said in a line if that changes it.

    Args:
      stored: what `describe_method` of that version returned.
      where: the file, for the line.
    """
    changed = {old: new for old, new in _RENAMED.items() if old in stored}
    found = {changed.get(name, name): value for name, value in stored.items()}
    tokens = [token for token in (*(found.get("closes") or ()), found.get("repeat")) if isinstance(token, dict)]
    changed |= {old: new for old, new in _RENAMED_OF_TOKENS.items() if any(old in token for token in tokens)}
    if not changed:
        return stored
    old, new = ", ".join(changed), ", ".join(changed.values())
    print(f"note: the method in {where} is of an earlier version; its {old} are read as {new}", file=sys.stderr)

    def new_token(token):
        return (
            {_RENAMED_OF_TOKENS.get(name, name): value for name, value in token.items()}
            if isinstance(token, dict)
            else token
        )

    renamed = {"closes": [new_token(token) for token in found["closes"]]}
    return found | renamed | ({"repeat": new_token(found["repeat"])} if "repeat" in found else {})


def completed(stored: dict[str, Any]) -> dict[str, Any]:
    """A description from a file, in which a field that the file does not have yet has its default."""
    return describe_method(Method("", Rule(()))) | stored


def _merged(spans: list[list[int]]) -> list[list[int | None]]:
    merged: list[list[int]] = []
    # Intervals that touch are one: distances are whole.
    for nearest, farthest in sorted(spans):
        if merged and nearest <= merged[-1][1] + 1:
            merged[-1][1] = max(merged[-1][1], farthest)
        else:
            merged.append([nearest, farthest])
    return [[nearest, farthest if farthest < INF else None] for nearest, farthest in merged]


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, tuple):
        return [_plain(x) for x in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"kind": type(value).__name__} | fields
    return value


def label(method: dict[str, Any]) -> str:
    """A described method in a few words, such as "ccm_merge (2 tokens, sink)"."""
    closes, words = len(method.get("closes", ())), []
    if closes:
        each = f", one for {method['ratio']} of text" if method.get("ratio") else ""
        words.append("up to " * bool(each) + f"{closes} token{'s' * (closes != 1)}{each}")
    if (groups := method.get("groups", 1)) != 1:
        words.append(f"{groups} groups")
    if policy := method.get("eviction"):
        # ByAttention -> by attention
        words.append(re.sub("(?<=.)([A-Z])", r" \1", policy["kind"]).lower())
        words.append(
            f"{policy['slots']} slot{'s' * (policy['slots'] != 1)} {'in all' if policy['constant'] else 'a chunk'}"
        )
    if method.get("sink"):
        words.append("sink")
    if recent := method.get("recent"):
        words.append(f"newest {recent} chunk{'s' * (recent != 1)} as text")
    if closes and "TEXT sees MEMORY" not in method.get("sees", {}) and method.get("context") == "chunks":
        words.append("independent")
    if closes and "TEXT" in method.get("gate", ()):
        words.append("LoRA on all tokens")
    return f"{method.get('name', '?')}" + f" ({', '.join(words)})" * bool(words)

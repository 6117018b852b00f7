"""What an evaluation asks, and what it compares: the method, the model and the words that each name stands for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_ccm.data.questions import Evaluation
from jax_ccm.evals import continuations, perplexity, streaming, texts
from jax_ccm.evals.continuations import Continuing
from jax_ccm.evals.perplexity import Measured, Stage, System
from jax_ccm.evals.replies import Asking
from jax_ccm.evals.scoring import base_only
from jax_ccm.evals.streaming import Budget
from jax_ccm.methods import build
from jax_ccm.nn import Transformer
from jax_ccm.rules.describe import describe_method, label
from jax_ccm.rules.types import Method
from jax_ccm.weights.adapters import load_adapter
from jax_ccm.weights.hf import is_adapter, parameters

SYSTEMS = {"step": ("none", "full", "uncompressed", "memory"), "text": ("full", "uncompressed", "memory")}
DEFAULT = {"step": ("none", "full", "memory"), "text": ("full", "uncompressed", "memory")}
for known in (SYSTEMS, DEFAULT):
    known |= dict.fromkeys(("age", "task", "continuation"), known["step"])
SYSTEMS["stream"] = DEFAULT["stream"] = ("window", "streaming_llm", "memory")
# What takes every record as a whole, and no ``steps``.
WHOLE = ("task", "text", "continuation")
# First tokens that StreamingLLM keeps: its own choice. Without any it is a window.
SINKS = {"streaming_llm": 4, "window": 0}


def make_system(
    name: str,
    model: Transformer,
    method: Method,
    *,
    base: Mapping[str, Any],
    adapter: str | Path | None,
    full_adapter: str | Path | None,
    source: str,
    accept_quantised_base: bool = False,
    capacity: int | None = None,
) -> System:
    """One of the systems.

    Args:
      name: one of `SYSTEMS`, or "full_lora".
      model: the base with the adapter.
      method: the compression method.
      base: what `weights.identity.describe_base` says of the model.
      adapter: where the adapter comes from; none if it is untrained.
      full_adapter: folder of the plain LoRA of "full_lora".
      source: where the base comes from.
      accept_quantised_base: it may have been trained on a base that differs by quantisation.
      capacity: memory slots of a session beyond which the oldest are forgotten; None for any number.
    """
    identity = f"{base['name']}|{base['fingerprint']}|{model.precision}|{jax.default_backend()}"
    # A gate of nothing: the base itself, whatever adapter was loaded.
    if name == "none":
        return System(name, model, base_only(build("none")), f"{base['name']}, no context", identity)
    if name == "full":
        return System(name, model, base_only(build("full")), f"{base['name']}, full context", identity)
    if name in SINKS:
        kept = f"its first {SINKS[name]} tokens and " if SINKS[name] else ""
        method = base_only(build("streaming_llm", sinks=SINKS[name]))
        return System(name, model, method, f"{base['name']}, {kept}the newest text", identity)
    if name == "uncompressed":
        # The method's own gate lets the LoRA act on all text.
        text = f"{base['name']}, full context, the adapter on all text"
        return System(name, model, build("full"), text, f"{identity}|{fingerprint(model)}")
    if name == "full_lora":
        assert full_adapter is not None
        model = load_adapter(
            full_adapter,
            model.with_adapter(None),
            method=build("full"),
            base=source,
            accept_quantised_base=accept_quantised_base,
        )
        text = f"{base['name']}, full context through the LoRA of {full_adapter}"
        return System(name, model, build("full"), text, f"{identity}|{fingerprint(model)}")
    # What writes no memory has nothing to forget.
    capacity = capacity if method.memory_slots(1 + method.recent) else None
    about = f"{base['name']} with {label(describe_method(method))}"
    about += "" if capacity is None else f", the newest {capacity} slots of memory"
    if method.eviction is not None:
        # Eviction is training-free: there is no adapter in it.
        return System(name, model.with_adapter(None), method, f"{about}, nothing trained", identity, capacity)
    if not adapter:
        print("note: no --adapter and no adapter.load: the memory is that of an untrained adapter")
    trained = f"the adapter of {adapter}" if adapter else "an untrained adapter"
    return System(name, model, method, f"{about}, {trained}", f"{identity}|{fingerprint(model)}", capacity)


def measure(
    system: System,
    evaluation: Evaluation,
    questions: Sequence[Stage],
    *,
    by: str,
    most: int,
    choices: bool,
    asking: Asking | Continuing | None,
    budget: Budget | None = None,
    **work: Any,
) -> list[Measured]:
    """All that is measured of a system.

    Args:
      system: what is measured.
      evaluation: the records.
      questions: of `ask`.
      by, most, choices: as for `ask`.
      asking: how replies or continuations are made; None for none.
      budget: slots of streams; None for anything else.
      **work: rows of a batch, store and log, as for `perplexity.measure`.
    """
    if by == "text":
        return texts.measure(system, evaluation, most, **work)
    if isinstance(asking, Continuing):
        return continuations.measure(system, evaluation, most, asking, **work)
    if budget is not None:
        return streaming.measure(system, questions, budget, **work)
    answer = evaluation.answer if choices else None
    measured = perplexity.measure(system, questions, answer=answer, **work)
    return measured if asking is None else perplexity.answered(system, questions, measured, asking, **work)


def fingerprint(model: Transformer) -> str:
    """A digest of the adapter: its scale and its numbers."""
    digest = hashlib.sha256(repr(model.adapter and model.adapter.scale).encode())
    for path, array in sorted(parameters(model).items()):
        if is_adapter(path):
            digest.update(path.encode() + np.asarray(array).tobytes())
    return digest.hexdigest()[:16]


def ask(
    evaluation: Evaluation,
    method: Method,
    steps: Sequence[int],
    *,
    by: str,
    most: int,
    choices: bool,
    split: str,
    tokens: int = 0,
    control: str = "another",
) -> tuple[list[Stage], list[int]]:
    """What is asked, told line by line, and the time steps for which no record is long enough.

    Args:
      evaluation: the records.
      method: the compression method.
      steps: chunks of context before the question, ages of what it asks for, or lengths of streams.
      by: "step", "age", "task", "text", "continuation" or "stream".
      most: questions of a step, or windows; 0 for all.
      choices: whether candidates are scored, too.
      split: which records they are, for the lines.
      tokens: of a continuation.
      control: "another" context or the own one "exchanged", as for `perplexity.stages`.
    """
    if by == "text":
        questions = texts.windows(evaluation, method, most)
        print(f"{len(questions[0].right):,} windows of {split}")
    elif by == "continuation":
        questions = [continuations.stage(evaluation, method, tokens, most)]
        print(f"{len(questions[0].right):,} windows of {split}, of which the last {tokens:,} tokens are continued")
    elif by == "stream":
        questions = streaming.stages(evaluation, steps, most)
        print(f"{len(questions[0].right):,} streams of {split}, of {questions[-1].step:,} tokens")
    else:
        questions = perplexity.stages(evaluation, steps, most=most, choices=choices, by=by, control=control)
        for stage in questions:
            beside = f"no wrong-memory control ({stage.note})" if stage.note else "with wrong-memory control"
            if control == "exchanged":
                beside = "with their answers exchanged as control"
                beside += f"; {stage.left_out:,} are not told word for word and left out" * bool(stage.left_out)
            name = {"age": "age ", "task": "task "}.get(by, "t=")
            print(f"{name}{stage.step}: {len(stage.right):,} of {split}, {beside}")
    missing = [] if by in WHOLE else sorted(set(steps) - {stage.step for stage in questions})
    for step in missing:
        what = {"age": "is of age", "stream": "is as long as"}.get(by, "has so many chunks of context as time step")
        print(f"no record {what} {step:,}, which is left out")
    return questions, missing

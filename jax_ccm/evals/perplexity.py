"""Perplexity of targets by time step, for several systems side by side, each with its wrong-memory control.

The protocol (CCM, Kim et al. 2024, section 4.1): ``exp(sum of losses / number of tokens)`` over target tokens, the end
of sequence excluded. The control is ours: the same turn after the context of another conversation. A memory that is
only a soft prompt for the style does as well with a wrong one, so what it knows of the content is the share

    content share = (wrong - right) of the memory / (wrong - right) of full context      in nats a token
    gap closed    = (none - memory) / (none - full)                                      in nats a token
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from jax_ccm.data.questions import Choice, Evaluation, wrong_memory_choices
from jax_ccm.errors import UserError
from jax_ccm.evals import replies, tasks
from jax_ccm.evals.replies import MEASURES, Asking, Reply
from jax_ccm.evals.scoring import Scores, Store, score
from jax_ccm.evals.slots import context_slots
from jax_ccm.evals.statistics import Estimate, Resamples, estimate, share, tree_to_json
from jax_ccm.memory.cache import check_memory_capacity
from jax_ccm.nn.transformer import Transformer
from jax_ccm.rules.examples import Example
from jax_ccm.rules.types import Method

# Which system is whose ceiling: the suffix of the shares, and the system with full context.
CEILINGS = {"": "full", "_to_full_lora": "full_lora"}


@dataclasses.dataclass(frozen=True, eq=False)
class System:
    """One of the systems that stand side by side.

    Attributes:
      name: "none", "full", "full_lora" or "memory"; shares are computed from these.
      model: the decoder with its adapter.
      method: what it runs.
      description: for people.
      identity: of the weights that decide its scores, for a `Store`.
      capacity: memory slots of a session beyond which the oldest are forgotten; None for any number.
    """

    name: str
    model: Transformer
    method: Method
    description: str
    identity: str = ""
    capacity: int | None = None

    def __post_init__(self):
        # Here, before hours are spent on the systems beside it.
        if self.capacity is not None:
            check_memory_capacity(self.method, self.capacity)


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """The questions of one time step.

    Attributes:
      step: the time step: context chunks before the tail; the age of what is asked for; the name of a task; or None
        for whole texts.
      right: sessions; one without choices is a question with one answer.
      wrong: the same tails after wrong contexts, those of other sessions or their own ones with what is asked for told
        otherwise; None where there are too few.
      note: why there are none, if so.
      left_out: questions that have no such context, and are not asked.
    """

    step: int | str | None
    right: list[Choice]
    wrong: list[Choice] | None
    note: str = ""
    left_out: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Measured:
    """Scores of one system at one time step: for each question those of its answers, in order.

    Attributes:
      right: with the own context.
      wrong: with another's, or None.
      slots: ``float64 [questions]``, key/value slots carried from the context to the tail.
      unconditional: total log-likelihood of an answer behind the answer prefix alone, by its tokens.
      beside: bytes that a session carries beside its slots: a mixture in float32.
      said: a reply to each question with the own context, and with another's or None; None if none were asked for.
      repeated: of `texts.repetition`; None where nothing is repeated.
      continued: of `continuations.measure`: JSON values of all continuations, and each of them as a line for people;
        None where none were made.
    """

    right: list[tuple[Scores, ...]]
    wrong: list[tuple[Scores, ...]] | None
    slots: np.ndarray
    unconditional: dict[bytes, float]
    beside: int = 0
    said: tuple[list[Reply], list[Reply] | None] | None = None
    repeated: dict[str, Any] | None = None
    continued: tuple[dict[str, Any], list[dict[str, Any]]] | None = None


def spread(found: Sequence[Any], most: int = 0) -> list[Any]:
    """So many of them, at equal distances; 0 for all."""
    if not most or len(found) <= most:
        return list(found)
    return [found[i] for i in np.linspace(0, len(found) - 1, most).round().astype(int)]


def stages(
    evaluation: Evaluation,
    steps: Sequence[int],
    *,
    most: int = 0,
    choices: bool = False,
    by: str = "step",
    control: str = "another",
) -> list[Stage]:
    """The questions of each time step that has any.

    Args:
      evaluation: the data.
      steps: time steps, or ages of what is asked for.
      most: questions of a time step, taken at equal distances from all; 0 for all.
      choices: whether the questions have several answers.
      by: "step"; "age"; or "task", which has all questions behind their whole contexts.
      control: what a wrong context is, that of "another" question, or the own one with what is asked for "exchanged";
        questions of which the latter cannot be told are left out.

    Raises:
      UserError: if no record is of any of the ages, or long enough for any of the time steps, or for "exchanged" of
        questions without choices.
    """
    if control == "exchanged" and not choices:
        raise UserError(
            "eval.control 'exchanged' takes what is told instead from the choices of a question, and there are none; "
            "set eval.control: another"
        )
    if by == "task":
        groups: dict[Any, list[Choice]] = dict(evaluation.by_task(choices=choices))
    else:
        at_step = evaluation.choices if choices else evaluation.questions
        groups = {step: (evaluation.choices_by_age if by == "age" else at_step)(step) for step in steps}
    found = []
    for step, right in groups.items():
        if control == "exchanged":
            told = [(question, other) for question in right if (other := evaluation.exchanged(question)) is not None]
            pairs = spread(told, most)
            if pairs:
                own, otherwise = map(list, zip(*pairs, strict=True))
                found.append(Stage(step, own, otherwise, left_out=len(right) - len(told)))
            continue
        right = spread(right, most)
        if not right:
            continue
        try:
            # The tails are the same, so that right and wrong are compared question by question.
            found.append(Stage(step, right, wrong_memory_choices(right)))
        except UserError as error:
            found.append(Stage(step, right, None, str(error)))
    if not found and control == "exchanged" and any(groups.values()):
        raise UserError(
            "eval.control 'exchanged' replaces the words of an answer where they were told, and no context says its "
            "answer word for word; set eval.control: another"
        )
    if not found and by == "age":
        raise UserError(f"no record is of an age among eval.steps {list(steps)} ({evaluation.report})")
    if not found:
        raise UserError(
            f"no record has as many as {min(steps)} context chunks, the smallest of eval.steps {list(steps)}; evaluate "
            f"smaller steps or longer records ({evaluation.report})"
        )
    return found


def measure(
    system: System,
    questions: Sequence[Stage],
    *,
    rows: int,
    answer: np.ndarray | None = None,
    carried: Callable[[Method, Example, int | None], int] = context_slots,
    store: Store | None = None,
    log: Callable[[str], None] | None = None,
) -> list[Measured]:
    """Scores all questions of all time steps with one system, together, so that they share compiled shapes.

    Args:
      system: what is measured.
      questions: the time steps.
      rows: rows of a batch.
      answer: int32 tokens of the answer prefix, for calibrated accuracy; None where there are no choices.
      carried: key/value slots of a session that are reported.
      store: where scores are kept, or None.
      log: takes a line on the work done.
    """
    # Without context there is none to be wrong.
    controlled = system.method.context != "dropped"
    sides = [
        (stage, questions)
        for stage in questions
        for questions in (stage.right, stage.wrong if controlled else None)
        if questions is not None
    ]
    asked = [example for _, side in sides for question in side for example in question.examples]
    alone = {} if answer is None else tasks.unconditional(questions[0].right[0].examples[0], asked, answer)
    asked += alone.values()
    made = score(
        system.model, system.method, asked, rows=rows, capacity=system.capacity, store=store,
        identity=system.identity, log=log, name=system.name,
    )  # fmt: skip
    # In the order in which they were asked: the sides of all time steps, then the answers alone.
    scores = iter(made)
    taken: dict[int | str | None, list[list[tuple[Scores, ...]]]] = {stage.step: [] for stage in questions}
    for stage, side in sides:
        taken[stage.step].append([tuple(next(scores) for _ in question.examples) for question in side])
    unconditional = {key: -float(next(scores).nll.sum()) for key in alone}
    return [
        Measured(
            taken[stage.step][0],
            taken[stage.step][1] if len(taken[stage.step]) > 1 else None,
            np.array([carried(system.method, q.examples[q.answer], system.capacity) for q in stage.right], float),
            unconditional,
            system.method.mixed_slots * system.model.config.kv_bytes_per_slot(4),
        )
        for stage in questions
    ]


def answered(
    system: System, questions: Sequence[Stage], measured: Sequence[Measured], asking: Asking, **options: Any
) -> list[Measured]:
    """What was measured, with a reply to every question of all time steps, and to those with wrong memory.

    Args:
      system: what was measured.
      questions: the time steps.
      measured: of them.
      asking: how replies are made.
      **options: as for `replies.answer`.
    """
    controlled = system.method.context != "dropped"
    sides = [(stage.right, stage.wrong if controlled else None) for stage in questions]
    asked = [question for pair in sides for side in pair for question in side or ()]
    name = f"{system.name}, replies"
    made = iter(
        replies.answer(
            system.model, system.method, asked, asking, capacity=system.capacity, identity=system.identity, name=name,
            **options,
        )
    )  # fmt: skip

    def take(side):
        return None if side is None else [next(made) for _ in side]

    said = [(take(right) or [], take(wrong)) for right, wrong in sides]
    return [dataclasses.replace(own, said=pair) for own, pair in zip(measured, said, strict=True)]


def summarise(
    questions: Sequence[Stage], measured: dict[str, list[Measured]], slot_bytes: int, *, pooled: bool = True
) -> list[dict[str, Any]]:
    """The numbers of each time step, and of all together if there are several.

    Args:
      questions: the time steps.
      measured: what `measure` returned for each system, by name.
      slot_bytes: bytes of a key/value slot over all layers.
      pooled: whether there is a row of all together.

    Returns:
      A nested dict for each time step, "step" being that of the `Stage`, or "all"; leaves that are uncertain are
      `Estimate`.
    """
    rows = [
        _summary(stage.step, [stage], {name: [steps[i]] for name, steps in measured.items()}, slot_bytes)
        for i, stage in enumerate(questions)
    ]
    if pooled and len(rows) > 1:
        rows.append(_summary("all", questions, measured, slot_bytes))
    return rows


def reply_lines(
    questions: Sequence[Stage], measured: dict[str, list[Measured]], texts: Callable[[Example], tuple[str, str]]
) -> Iterator[dict[str, Any]]:
    """Every question with its reply, and every continuation of a text, as plain values: for people to read.

    Args:
      questions: the time steps.
      measured: of each system, by name.
      texts: the question of a session, and the answer to it (`Asking.texts`).
    """
    for number, stage in enumerate(questions):
        for name, steps in measured.items():
            yield from ({"system": name} | line for line in (steps[number].continued or ((), ()))[1])
            # A system without context has no replies behind a wrong one.
            for context, said in zip(("right", "wrong"), steps[number].said or (), strict=False):
                for question, reply in zip(stage.right, said or (), strict=False):
                    example = question.examples[question.answer]
                    query, target = texts(example)
                    line = {"step": stage.step, "system": name, "context": context, "record": example.id}
                    line |= {"query": query, "target": target}
                    yield line | {"reply": reply.text} | {key: round(getattr(reply, key), 6) for key in MEASURES}


def to_json(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What `summarise` returned, as plain values for JSON."""
    return tree_to_json(list(rows))


def _summary(
    step: int | str | None, questions: Sequence[Stage], measured: dict[str, list[Measured]], slot_bytes: int
) -> dict[str, Any]:
    right = [question for stage in questions for question in stage.right]
    controlled = all(stage.wrong is not None for stage in questions)
    # Drawn by record: questions about the same conversation are not independent. The same draws serve all systems.
    resamples = Resamples([question.examples[question.answer].id for question in right])
    row: dict[str, Any] = {"step": step, "examples": len(right), "dialogues": resamples.groups}
    row |= {"tokens": 0, "systems": {}}
    notes = [stage.note for stage in questions if stage.note]
    if notes:
        row["note"] = notes[0]
    losses: dict[str, np.ndarray] = {}
    wrong_losses: dict[str, np.ndarray] = {}
    # Of each system, behind the right contexts and behind wrong ones.
    rights: dict[str, dict[str, np.ndarray]] = {}
    wrongs: dict[str, dict[str, np.ndarray]] = {}
    for name, steps in measured.items():
        own = [scores for stage in steps for scores in stage.right]
        loss, cell = _cell(right, own, resamples)
        losses[name] = loss
        slots = np.concatenate([stage.slots for stage in steps])
        cell |= {"kv_slots": float(slots.mean()), "kv_bytes": float(slots.mean() * slot_bytes) + steps[0].beside}
        row["tokens"] = cell.pop("tokens")
        if steps[0].repeated is not None:
            cell["repetition"] = steps[0].repeated
        if steps[0].continued is not None:
            cell["continuations"] = steps[0].continued[0]
        accuracy = tasks.accuracy(right, own, steps[0].unconditional, resamples)
        if accuracy:
            cell["accuracy"] = accuracy
        said = [reply for step in steps if step.said for reply in step.said[0]]
        rights[name] = _rights(right, own, said, resamples)
        if said:
            cell["replies"] = _replies(said, rights[name])
        # Numbers of all time steps together have a control only if each of them has.
        if controlled and all(stage.wrong is not None for stage in steps):
            others = [scores for stage in steps for scores in stage.wrong or ()]
            wrong_losses[name], wrong = _cell(right, others, resamples)
            wrong.pop("tokens")
            accuracy = tasks.accuracy(right, others, steps[0].unconditional, resamples)
            if accuracy:
                wrong["accuracy"] = accuracy
            # Of the same draws: the difference of pairs, whose interval is narrower than those of its two sides.
            wrong["minus_right"] = estimate(wrong_losses[name] - loss)
            said = [reply for step in steps if step.said for reply in step.said[1] or ()]
            wrongs[name] = _rights(right, others, said, resamples)
            if said:
                wrong["replies"] = _replies(said, wrongs[name])
            cell["wrong"] = wrong
        row["systems"][name] = cell
    for name, cell in row["systems"].items():
        others = {"minus_wrong": wrongs.get(name, {}), "minus_none": {} if name == "none" else rights.get("none", {})}
        paired = {
            key: {what: estimate(own - other[key]) for what, other in others.items() if key in other}
            for key, own in rights[name].items()
        }
        if any(paired.values()):
            cell["differences"] = paired
    return row | _shares(losses, wrong_losses)


def _rights(
    questions: Sequence[Choice],
    scores: Sequence[tuple[Scores, ...]],
    said: Sequence[Reply],
    resamples: Resamples,
) -> dict[str, np.ndarray]:
    """Resampled accuracy by the mean over tokens, and what replies are worth, where these were measured."""
    ones, found = np.ones(len(questions)), {}
    if chosen := tasks.correct(questions, scores, {}):
        found["accuracy"] = resamples.mean(chosen["mean"], ones)
    if said:
        values = {key: np.array([getattr(reply, key) for reply in said]) for key in MEASURES}
        found |= {key: resamples.mean(value, ones) for key, value in values.items()}
    return found


def _replies(said: Sequence[Reply], rights: dict[str, np.ndarray]) -> dict[str, Any]:
    """The numbers of some replies."""
    return {key: estimate(rights[key]) for key in MEASURES} | {
        "tokens": float(np.mean([reply.tokens for reply in said])),
        "cut": float(np.mean([reply.cut for reply in said])),
    }


def _cell(
    right: Sequence[Choice], scores: Sequence[tuple[Scores, ...]], resamples: Resamples
) -> tuple[np.ndarray, dict[str, Any]]:
    """Resampled losses a token, and the numbers, of the right answers."""
    answers = [found[question.answer] for question, found in zip(right, scores, strict=True)]
    totals = np.array([answer.nll.sum() for answer in answers])
    counts = np.array([len(answer.nll) for answer in answers], float)
    hits = np.array([answer.hit.sum() for answer in answers], float)
    # Losses are pooled before the exponential (CCM, section 4.1): long answers weigh more than short ones.
    loss = resamples.mean(totals, counts)
    return loss, {
        "tokens": int(counts.sum()),
        "nll": estimate(loss),
        "perplexity": estimate(np.exp(loss)),
        # The reference implementation reports this mean over examples, too.
        "nll_by_example": float(np.mean(totals / counts)),
        "token_accuracy": estimate(resamples.mean(hits, counts)),
    }


def _shares(losses: dict[str, np.ndarray], wrong: dict[str, np.ndarray]) -> dict[str, Estimate]:
    """Gap closed and content share of the memory, against each ceiling that was measured."""
    found = {}
    for suffix, full in CEILINGS.items():
        if {"none", "memory", full} <= set(losses):
            found[f"gap_closed{suffix}"] = share(losses["none"] - losses["memory"], losses["none"] - losses[full])
        if {"memory", full} <= set(wrong):
            # What the right context is worth, to the memory and to full context.
            knows = {name: wrong[name] - losses[name] for name in ("memory", full)}
            found[f"content_share{suffix}"] = share(knows["memory"], knows[full])
    return found

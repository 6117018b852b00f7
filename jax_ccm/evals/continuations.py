"""Open-ended generation: how each system goes on with a text whose beginning it holds in its memory.

Of each window of text the last tokens are what really comes, and what stands before is read as a prompt, compressed as
the method compresses text. From there continuations are drawn by nucleus sampling (Holtzman et al. 2020), as zero-shot
generation of documents is measured by Ren, Jia and Zhu (EMNLP 2023), whose exact settings are not public. Beside the
perplexity of what really comes, of every continuation

* judge perplexity: that of another model, behind the uncompressed prompt: fluency. Low is not better without end:
  compare with that of what really comes;
* ROUGE-1, -2 and -L: F-measures of `rouge-score` with stems, beside what really comes;
* BLEU: sentence BLEU of `sacrebleu` with effective order, from 0 to 1, beside what really comes;
* distinct-2: different pairs of neighbouring words, of all pairs (Li et al. 2016): low where a text repeats itself;
* self-BLEU: BLEU of a continuation beside the others of its prompt (Zhu et al. 2018): high where all are alike;
* similarity: the cosine between its sentence embedding and that of what really comes, by a model that the user names.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jax_ccm.data.questions import Evaluation, wrong_memory_choices
from jax_ccm.errors import UserError
from jax_ccm.evals import perplexity, texts
from jax_ccm.evals.perplexity import Measured, Stage, System
from jax_ccm.evals.replies import Asking, continued, prompt, query_and_answer
from jax_ccm.evals.scoring import Store, base_only, once, score
from jax_ccm.evals.slots import held_slots
from jax_ccm.evals.statistics import Resamples, estimate, tree_to_json
from jax_ccm.memory.generation import Sampling
from jax_ccm.methods import build
from jax_ccm.nn.transformer import Transformer
from jax_ccm.rules.examples import Example, Segment, concat
from jax_ccm.rules.types import Method
from jax_ccm.weights.base import load_model
from jax_ccm.weights.identity import describe_base
from jax_ccm.weights.tokenizers import load_tokenizer

# What is averaged over continuations as it stands.
MEASURES = ("rouge1", "rouge2", "rougeL", "bleu", "distinct2", "self_bleu", "similarity")


@dataclasses.dataclass(frozen=True)
class Judge:
    """A model whose perplexity says how fluent a text is.

    Attributes:
      name: for people.
      model: the decoder; its adapter acts nowhere.
      encode: from a text to token ids, without special tokens.
      identity: of its weights, for a `Store`.
    """

    name: str
    model: Transformer
    encode: Callable[[str], Sequence[int]]
    identity: str

    @classmethod
    def of(cls, source: str, *, model: Transformer, tokenizer: Any, base: dict[str, Any]) -> Judge:
        """The judge that a source names, or for "" the base that is evaluated, which then judges itself.

        Args:
          source: as for `load_model`; "" for none.
          model, tokenizer: those that are evaluated.
          base: what `describe_base` says of the model.
        """
        name = f"{base['name']}, the evaluated base itself"
        if source:
            model, tokenizer, name = load_model(source, precision=model.precision), load_tokenizer(source), source
            base = describe_base(model, source)
        encode = functools.partial(tokenizer.encode, add_special_tokens=False)
        return cls(name, model, encode, f"{base['name']}|{base['fingerprint']}|{model.precision}")

    def losses(
        self, prompts: Sequence[str], said: Sequence[str], *, rows: int, store: Store | None, log, name: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """Summed negative log-likelihoods in nats of texts behind their prompts, and their tokens: ``float64 [n]``."""
        made, ids = [], {text: np.array(self.encode(text), np.int32) for text in {*prompts, *said}}
        for before, text in zip(prompts, said, strict=True):
            # The last token of a prompt stands with the text, whose first it predicts; what is in front of it is read
            # once for all texts behind it. Without a prompt nothing predicts the first token.
            context, last = ids[before][:-1], ids[before][-1:]
            tail = np.concatenate([last, ids[text]])
            parts = [Segment(context, np.zeros(len(context), bool))] if len(context) else []
            parts.append(Segment(tail, np.arange(len(tail)) >= 1))
            made.append(Example(tail[:0], tail[:0], tuple(parts), f"{name} {len(made)}"))
        some = [number for number, example in enumerate(made) if example.segments[-1].scored.any()]
        found = score(
            self.model, base_only(build("full")), [made[number] for number in some], rows=rows, store=store,
            identity=self.identity, log=log, name=f"{name}, judged",
        )  # fmt: skip
        totals, counts = np.zeros(len(said)), np.zeros(len(said))
        for number, scores in zip(some, found, strict=True):
            totals[number], counts[number] = scores.nll.sum(), len(scores.nll)
        return totals, counts


@dataclasses.dataclass(frozen=True)
class Continuing:
    """How texts are continued, and what continuations are compared by.

    Attributes:
      asking: lengths, stops and vocabulary.
      samples: continuations of a prompt.
      sampling: how tokens are drawn.
      seed: of the drawing.
      judge: of fluency.
      embed: from texts to unit vectors ``[n, d]``; None for no similarity.
    """

    asking: Asking
    samples: int
    sampling: Sampling
    seed: int
    judge: Judge
    embed: Callable[[Sequence[str]], np.ndarray] | None = None

    def texts(self, example: Example) -> tuple[str, str]:
        """The prompt and what really comes, as text."""
        query, target = query_and_answer(example)
        before = np.concatenate([*(segment.tokens for segment in example.segments[:-1]), query])
        return self.asking.decode(before.tolist()), self.asking.decode(target.tolist())

    @classmethod
    def of(cls, asking: Asking, said: Any, **evaluated: Any) -> Continuing:
        """As the config's ``eval`` says.

        Args:
          asking: lengths, stops and vocabulary.
          said: ``eval`` of the config, with samples, top_p, seed, judge and embedder.
          **evaluated: model, tokenizer and base, as for `Judge.of`.

        Raises:
          UserError: where a package is missing, before anything is computed.
        """
        try:
            import rouge_score.rouge_scorer  # noqa: F401
            import sacrebleu.metrics.bleu  # noqa: F401
        except ImportError as e:
            raise UserError(
                f"eval.by 'continuation' needs rouge-score and sacrebleu ({e}): pip install 'jax_ccm[generation]'"
            ) from None
        judge, embed = Judge.of(said.judge, **evaluated), sentence_embedder(said.embedder)
        return cls(asking, said.samples, Sampling(temperature=1.0, top_p=said.top_p), said.seed, judge, embed)


def sentence_embedder(name: str) -> Callable[[Sequence[str]], np.ndarray] | None:
    """Sentence embeddings by ``sentence-transformers``: from texts to unit vectors; None for the name "".

    Raises:
      UserError: where the package is not installed, or has no such model.
    """
    if not name:
        return None
    try:
        from sentence_transformers import SentenceTransformer  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            f"eval.embedder is {name!r}, and sentence-transformers, which reads it, is not installed: pip install "
            "'jax_ccm[similarity]', or leave eval.embedder out for no similarity"
        ) from None
    try:
        model = SentenceTransformer(name, device="cpu")
    except (OSError, ValueError) as e:
        raise UserError(f"eval.embedder {name!r} cannot be read: {e}") from None
    return functools.partial(model.encode, normalize_embeddings=True, convert_to_numpy=True)


def stage(evaluation: Evaluation, method: Method, tokens: int, most: int = 0) -> Stage:
    """Windows of text cut into a prompt and what really comes, beside the same behind the prompt of another window.

    Args:
      evaluation: the data.
      method: what will read them.
      tokens: how many really come; the prompt is at least as long.
      most: windows, taken at equal distances from all; 0 for all.

    Raises:
      UserError: where no window is long enough.
    """
    found = [
        example
        for example in evaluation.texts(marked=method.heeds_marks)
        if sum(len(segment.tokens) for segment in example.segments) >= 2 * tokens
    ]
    if not found:
        raise UserError(
            f"no window of text has {2 * tokens} tokens, {tokens} of a prompt and eval.reply_tokens={tokens} of what "
            f"comes; lower eval.reply_tokens, or raise data.max_chunks ({evaluation.report})"
        )
    right = texts.questions([cut(example, tokens, method) for example in found], most)
    try:
        return Stage(None, right, wrong_memory_choices(right))
    except UserError as error:
        return Stage(None, right, None, str(error))


def cut(example: Example, tokens: int, method: Method) -> Example:
    """The window with its last tokens as the answer.

    Segments that end before these are closed; the last of the prompt is open, as it is while a text is written. Where
    the data hide tokens for good, the prompt is context but for its last token, since a tail is seen as a whole.
    """
    border = sum(len(segment.tokens) for segment in example.segments) - tokens
    ends = np.cumsum([len(segment.tokens) for segment in example.segments])
    # A prompt that ends with a segment leaves it open, too: something must predict the first token of the answer.
    closed = int(np.searchsorted(ends, border))
    tail = concat(*example.segments[closed:])
    scored = np.arange(len(tail.tokens)) >= len(tail.tokens) - tokens
    context = example.segments[:closed]
    if tail.kept is not None and method.closes:
        # A span that the border cuts is never closed.
        tail = Segment(tail.tokens, scored, np.ones(len(scored), bool))
    elif tail.kept is not None:
        # Something must predict the first token of the answer.
        last = len(scored) - tokens - 1
        context = (*context, Segment(tail.tokens[:last], scored[:last], tail.kept[:last]))
        tail = Segment(tail.tokens[last:], scored[last:])
    else:
        tail = Segment(tail.tokens, scored)
    context = tuple(dataclasses.replace(s, scored=np.zeros(len(s.tokens), bool)) for s in context)
    return dataclasses.replace(example, segments=(*context, tail))


def measure(
    system: System,
    evaluation: Evaluation,
    most: int,
    continuing: Continuing,
    *,
    rows: int,
    store: Store | None = None,
    log: Callable[[str], None] | None = None,
) -> list[Measured]:
    """`perplexity.measure` of what really comes, and continuations; slots are those held behind the prompt.

    Args:
      system: what is measured.
      evaluation: the data.
      most: as for `stage`.
      continuing: how.
      rows, store, log: as for `perplexity.measure`.
    """
    asking, log = continuing.asking, log or (lambda line: None)
    asked = stage(evaluation, system.method, asking.max_tokens, most)

    def carried(method: Method, example: Example, capacity: int | None) -> int:
        return held_slots(method, prompt(example), capacity)

    (measured,) = perplexity.measure(system, [asked], rows=rows, carried=carried, store=store, log=log)
    examples = [question.examples[0] for question in asked.right]
    said = [asking.decode(tokens.tolist()) for tokens in _drawn(system, examples, continuing, rows, store, log)]
    before, after = zip(*map(continuing.texts, examples), strict=True)
    each = np.repeat(np.arange(len(examples)), continuing.samples)
    found = compare(said, [after[number] for number in each], continuing)
    work: dict[str, Any] = {"rows": rows, "store": store, "log": log}
    nll, judged = continuing.judge.losses([before[n] for n in each], said, name=system.name, **work)
    resamples = Resamples([example.id for example in examples])

    def of_prompts(values):
        return np.bincount(each, values)

    count = of_prompts(np.ones(len(each)))
    summary = {key: estimate(resamples.mean(of_prompts(values), count)) for key, values in found.items()}
    summary["judge_perplexity"] = estimate(np.exp(resamples.mean(of_prompts(nll), of_prompts(judged))))
    lines = [
        {"record": examples[n].id, "prompt": before[n], "target": after[n], "reply": said[i]}
        | {key: round(float(values[i]), 6) for key, values in found.items()}
        for i, n in enumerate(each)
    ]
    return [dataclasses.replace(measured, continued=(tree_to_json(summary), lines))]


def _drawn(system: System, examples: Sequence[Example], continuing: Continuing, rows: int, store, log) -> list:
    """Tokens of the continuations of each prompt, those of a prompt one behind the other."""
    asking = continuing.asking
    # A prompt is read once for all of its continuations.
    prompts = [prompt(example) for example in examples for _ in range(continuing.samples)]
    what = f"{continuing.samples} continuations of {asking.max_tokens} below {asking.vocabulary} until {asking.stops}"
    what += f" by {continuing.sampling}, seed {continuing.seed}, of {system.capacity} slots"

    def compute() -> dict[str, np.ndarray]:
        start = time.perf_counter()
        made = continued(
            system.model, system.method, prompts, max_tokens=asking.max_tokens, stops=asking.stops,
            vocabulary=asking.vocabulary, rows=rows, capacity=system.capacity, sampling=continuing.sampling,
            seed=continuing.seed,
        )  # fmt: skip
        seconds = time.perf_counter() - start
        log(f"{system.name}: {len(made):,} continuations, {sum(map(len, made)):,} tokens, {seconds:.0f} s")
        return {"lengths": np.array([len(x) for x in made]), "tokens": np.concatenate(made)}

    about = f"{system.name}: {len(prompts):,} continuations, made"
    known = once(
        store, system.identity, system.method, prompts, ("lengths", "tokens"), compute, what=what, log=log, about=about
    )
    return np.split(known["tokens"], np.cumsum(known["lengths"])[:-1])


def compare(said: Sequence[str], targets: Sequence[str], continuing: Continuing) -> dict[str, np.ndarray]:
    """The measures of continuations, ``float64 [n]`` each; those of a prompt stand one behind the other.

    Args:
      said: the continuations.
      targets: what really comes, for each.
      continuing: how many there are of a prompt, and the embedder.
    """
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.bleu import BLEU

    rouge, bleu = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True), BLEU(effective_order=True)
    found: dict[str, list[float]] = {key: [] for key in MEASURES}
    for number, (text, target) in enumerate(zip(said, targets, strict=True)):
        for key, scores in rouge.score(target, text).items():
            found[key].append(scores.fmeasure)
        found["bleu"].append(bleu.sentence_score(text, [target]).score / 100)
        found["distinct2"].append(distinct(text))
        first = number - number % continuing.samples
        others = [said[i] for i in range(first, first + continuing.samples) if i != number]
        if others:
            found["self_bleu"].append(bleu.sentence_score(text, others).score / 100)
    if continuing.embed is not None:
        ours, theirs = (np.asarray(continuing.embed(list(each)), np.float64) for each in (said, targets))
        found["similarity"] = np.sum(ours * theirs, axis=1).tolist()
    return {key: np.array(values, np.float64) for key, values in found.items() if values}


def distinct(text: str, size: int = 2) -> float:
    """Different runs of so many words, of all there are; 1 for a text that has none."""
    words = text.lower().split()
    runs = list(zip(*(words[begin:] for begin in range(size)), strict=False))
    return len(set(runs)) / len(runs) if runs else 1.0


def reference(questions: Sequence[Stage], continuing: Continuing, **work: Any) -> dict[str, Any]:
    """What really comes, measured as continuations are, where that says anything: fluency and repetition.

    Args:
      questions: the one `stage`.
      continuing: how continuations were made.
      **work: rows, store and log, as for `measure`.
    """
    examples = [question.examples[0] for question in questions[0].right]
    before, after = zip(*map(continuing.texts, examples), strict=True)
    nll, judged = continuing.judge.losses(before, after, name="what really comes", **work)
    resamples = Resamples([example.id for example in examples])
    own = np.array([distinct(text) for text in after])
    return tree_to_json(
        {
            "judge": continuing.judge.name,
            "judge_perplexity": estimate(np.exp(resamples.mean(nll, judged))),
            "distinct2": estimate(resamples.mean(own, np.ones(len(own)))),
        }
    )

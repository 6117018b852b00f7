"""Compares the library with arrays recorded from the CCM reference implementation.

    python -m tests.golden_check DIR

runs every case (``*.npz``) of a folder laid out like ``tests/golden/ccm`` (its README explains the arrays), prints a
line for each array with its largest difference, and exits 1 if one exceeds 1e-4, an integer array differs at all, or a
case is not understood.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from optax.losses import softmax_cross_entropy_with_integer_labels as cross_entropy

from jax_ccm.memory import losses, steps
from jax_ccm.memory.cache import init_cache
from jax_ccm.memory.generation import generate
from jax_ccm.methods import build
from jax_ccm.nn import Transformer
from jax_ccm.rules import rows, visibility
from jax_ccm.rules.batch import Batch
from jax_ccm.rules.examples import Example, Segment
from jax_ccm.rules.rows import Sizes
from jax_ccm.rules.types import Array, Chunk, Kind, MemoryCache, Method
from jax_ccm.weights import load_model
from jax_ccm.weights.adapters import Adapter, load_adapter
from jax_ccm.weights.reference import reference_tensors

TOLERANCE = 1e-4
WINDOW, CLOSES, CAPACITY = 32, 16, 8  # of the recorded streams

PARALLEL = re.compile(
    r"(?P<base>mistral_gqa_)?(?P<kind>concat|merge|gist)(?:_(?P<chunks>recur|norecur))?_n(?P<n>\d+)(?P<flags>(?:_sink|_loadpath)*)"
)
PLAIN = re.compile(r"(?P<base>mistral_gqa_)?(?P<kind>full|no)_context")
STREAM = re.compile(r"(?P<base>mistral_gqa_)?stream_(?P<kind>concat|merge)_n(?P<n>\d+)(?:_fixed)?")
WINDOWED = re.compile(r"(?P<base>mistral_gqa_)?stream_window_only")


@dataclasses.dataclass(frozen=True)
class Case:
    """What a case's name says: the base model, adapters (the first may be merged into it), and the method."""

    base: str
    merged: str | None
    adapter: str | None
    method: Method


def parse(name: str) -> Case:
    """The case of a file's name.

    Raises:
      ValueError: if the name is not understood.
    """
    if match := PARALLEL.fullmatch(name):
        kind, n = match["kind"], int(match["n"])
        options = {"comp_tokens": n, "sink": "_sink" in match["flags"]}
        if (kind == "gist") != (match["chunks"] is None):
            raise ValueError(f"case {name!r}: gist has no chunk mode, concat and merge need one")
        if kind == "gist":
            method = build("gist", **options)
        else:
            method = build(f"ccm_{kind}", independent=match["chunks"] == "norecur", **options)
        adapter = f"{kind}_n{n}"
        merged = "full_lora" if "_loadpath" in match["flags"] else None
    elif match := PLAIN.fullmatch(name):
        adapter, merged = "full_lora", None
        method = build("full" if match["kind"] == "full" else "none")
    elif match := STREAM.fullmatch(name):
        adapter, merged = f"{match['kind']}_n{match['n']}", None
        method = build(f"ccm_{match['kind']}", comp_tokens=int(match["n"]), sink=True, streaming=True)
    elif match := WINDOWED.fullmatch(name):
        adapter, merged, method = None, None, build("streaming_llm")
    else:
        raise ValueError(f"case {name!r} is not understood")
    prefix = "mistral_" if match["base"] else ""
    named = lambda adapter: adapter and prefix + adapter
    return Case("tiny-mistral-gqa" if prefix else "tiny-llama", named(merged), named(adapter), method)


def load(folder: Path, case: Case) -> Transformer:
    """The model of a case: base, merged first adapter, adapter; in float32, as recorded, on any processor."""
    model = load_model(str(folder / case.base), precision="float32")
    for name in filter(None, (case.merged, case.adapter)):
        # Gisting has the same tokens as concat, and may come without an adapter of its own.
        named = (name, name.replace("gist", "concat"))
        found = [
            path for n in named for kind in ("", "_safetensors") if (path := folder / f"adapters{kind}" / n).exists()
        ]
        if not found:
            raise ValueError(f"adapter {name!r} is not in {folder}/adapters")
        if name == case.merged:
            model = Adapter.read(found[0]).merged_into(model)
        else:
            model = load_adapter(found[0], model, method=case.method)
    return model


Row = tuple[str, float]


def difference(ours, theirs) -> float:
    """Largest absolute difference; for integers the number of unequal cells."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    if ours.shape != theirs.shape:
        return float("inf")
    if np.issubdtype(theirs.dtype, np.integer):
        return float((ours != theirs).sum())
    return float(np.abs(ours.astype(np.float64) - theirs).max(initial=0.0))


def check(path: Path) -> Iterator[Row]:
    """Yields ``(array, difference)`` for every array of a case; infinite for one that is not understood."""
    case = parse(path.stem)
    data = dict(np.load(path))
    model = load(path.parent, case)
    if case.method.rope == "cache":
        found = check_stream(model, case.method, data)
    else:
        found = {**check_parallel(model, case.method, data), **check_recurrent(model, case.method, data)}
    for name in data:
        yield name, found.get(name, float("inf"))


def examples_of(method: Method, data: dict, vocab: int) -> tuple[list[Example], np.ndarray]:
    """Sessions cut out of the reference's token rows, and ``bool [B, S]``: its ``<SUM>`` places."""
    ids, n = data["input_ids"], len(method.closes)
    is_sum = ids >= vocab + n if n else np.zeros(ids.shape, bool)
    examples = []
    for row, valid, labels, sums in zip(ids, data["attention_mask"] > 0, data["labels"], is_sum, strict=True):
        kept = valid & ~sums
        row, scored = row[kept], labels[kept] >= 0
        ends = np.flatnonzero(row == vocab + n - 1) + 1 if n else []
        segments = [
            Segment(tokens[tokens < vocab], score[tokens < vocab])
            for tokens, score in zip(np.split(row, ends), np.split(scored, ends), strict=True)
        ]
        examples.append(Example(np.zeros(0, np.int32), np.zeros(0, np.int32), tuple(segments)))
    return examples, is_sum


@functools.partial(jax.jit, static_argnames="method")
def forward(model: Transformer, batch: Batch, method: Method):
    """Hidden states, logits, loss, and adapter gradients of a parallel forward."""
    graphdef, adapter, base = nnx.split(model, nnx.LoRAParam, ...)

    def loss(adapter):
        hidden = steps.parallel_forward(nnx.merge(graphdef, adapter, base), batch, method=method)
        return losses.mean_loss(model, hidden, batch, method)[0]

    gate = visibility.gate(method, batch.slots)
    hidden, _, states = model(
        batch.tokens, batch.slots, gate, rule=method.rule, memory=batch.memory, output_hidden_states=True
    )
    value, gradients = jax.value_and_grad(loss)(adapter)
    return states, model.logits(hidden), value, gradients


def check_parallel(model: Transformer, method: Method, data: dict) -> dict[str, float]:
    """Masks, positions, hidden states, logits, loss and gradients of the parallel forward.

    Rows of ``<SUM>`` tokens are left out: they exist only in the reference, and nothing reads what they compute.
    Their columns are compared with our memory slots.
    """
    vocab = model.config.vocab_size
    examples, is_sum = examples_of(method, data, vocab)
    needs = [rows.measure(dataclasses.replace(method, context="chunks"), example) for example in examples]
    sizes = Sizes.of_all(needs)
    # The reference's rows are arranged already.
    batch = rows.batch(dataclasses.replace(method, context="chunks"), examples, sizes, vocab, pad="left")
    states, logits, loss, gradients = jax.device_get(forward(model, batch, method))
    graphdef, _, base = nnx.split(model, nnx.LoRAParam, ...)
    as_adapter = Adapter.of(nnx.merge(graphdef, gradients, base), method=method, base="")

    valid = data["attention_mask"] > 0
    own = visibility.visible(method.rule, batch.slots, batch.slots)
    past = visibility.visible(method.rule, batch.slots, batch.memory.slots) if batch.memory else None
    live = batch.slots.live
    # Our arrays on the reference's places.
    spread = lambda ours, fill, where: _spread(ours, fill, where, live)
    text = valid & ~is_sum
    seen = np.zeros(data["allowed"][:, 0].shape, np.uint8)
    averaging = np.zeros(seen.shape, np.float32)
    for b in range(len(seen)):
        places = np.flatnonzero(text[b])
        columns = np.flatnonzero(live[b])
        seen[b][np.ix_(places, places)] = own[b][np.ix_(columns, columns)]
        if past is None:
            continue
        to_reference = np.zeros(live.shape[1], int)
        to_reference[columns] = places
        slots = np.flatnonzero(batch.memory.slots.live[b])
        sources = to_reference[batch.memory.source[b, slots]]
        sums = np.flatnonzero(is_sum[b])
        # With independent chunks the reference writes only the last state.
        states_written = slots[len(slots) - len(sums) :] if method.mix is not None else slots
        target = sums if method.mix is not None else sources
        hidden_states = np.setdiff1d(slots, states_written)
        assert not past[b][:, hidden_states].any(), "a memory state is visible that the reference does not have"
        for slot, column in zip(states_written, target, strict=True):
            seen[b][places, column] |= past[b][columns, slot]
            if method.mix is not None:
                averaging[b][column, sources] = batch.memory.mix[b, slot, slots]
    theirs = data["allowed"][:, 0] * ~is_sum[:, :, None] * valid[:, :, None]
    causal = np.tril(np.ones(seen.shape[1:], bool)) & valid[:, None, :]
    before = (data["attention_mask_comp"][:, 0] > 0) & causal & ~is_sum[:, :, None] & valid[:, :, None]
    gate = np.asarray(visibility.gate(method, batch.slots))
    found = {
        "input_ids": difference(spread(batch.tokens, 0, text) * text, data["input_ids"] * text),
        "labels": difference(_labels(batch, text, live, data["labels"].shape), np.where(text, data["labels"], -100)),
        "attention_mask": difference(spread(live.astype(np.uint8), 0, text) | is_sum, data["attention_mask"]),
        "position_ids": difference(
            np.where(is_sum, 0, spread(batch.slots.position, 1, text)), np.where(is_sum, 0, data["position_ids"])
        ),
        "allowed": difference(seen, theirs.astype(np.uint8)),
        "attention_mask_comp": difference(seen, before.astype(np.uint8)),
        "comp_mask": difference(spread(gate, 0, text), data["comp_mask"] * text) if "comp_mask" in data else 0.0,
        "sum_mask": difference(is_sum.astype(np.float32), data["sum_mask"]) if "sum_mask" in data else 0.0,
        "sum_attn_mask": difference(averaging, data["sum_attn_mask"]) if "sum_attn_mask" in data else 0.0,
        "hidden_states": max(
            difference(ours[live], theirs[text]) for ours, theirs in zip(states, data["hidden_states"], strict=True)
        ),
        "logits": difference(logits[live], data["logits"][text]),
        "loss": difference(loss, data["loss"]),
    }
    for name, gradient in reference_tensors(as_adapter).items():
        found[f"grad/{name}"] = difference(gradient, data.get(f"grad/{name}", np.zeros(0)))
    return found


def _spread(ours, fill, text, live):
    out = np.full(text.shape, fill, np.asarray(ours).dtype)
    for b in range(len(out)):
        out[b, text[b]] = ours[b][live[b]]
    return out


def _labels(batch: Batch, text, live, shape):
    """Labels in the reference's form: the scored tokens at their own places."""
    ours = np.full(live.shape, -100)
    for b, row in enumerate(np.asarray(batch.weights) > 0):
        for place, target in zip(batch.indices[b, row], batch.targets[b, row], strict=True):
            # The target stands at the next place that is no compression token: in these files right behind.
            ours[b, place + 1] = target
    out = np.full(shape, -100)
    for b in range(len(out)):
        out[b, text[b]] = ours[b, live[b]]
    return out


def check_recurrent(model: Transformer, method: Method, data: dict) -> dict[str, float]:
    """Memory after each chunk, the query's logits and greedy continuations of the batched recurrence."""
    rows = sorted({name.split("/")[0] for name in data if name.startswith("rec")})
    if not rows:
        return {}
    count = [sum(name.startswith(f"{row}/ctx") and name.endswith("_ids") for name in data) for row in rows]
    width = max(len(x) for name, x in data.items() if name.startswith("rec") and name.endswith("_ids"))
    cache = init_cache(
        model, method, len(rows), memory_capacity=method.memory_slots(max(count)), raw_capacity=width + 64
    )
    read = jax.jit(steps.read, static_argnames=("method", "query"))
    compress = jax.jit(steps.compress, static_argnames="method")
    found: dict[str, float] = {}

    def chunk(ids: list) -> Chunk:
        tokens, valid = np.zeros((len(ids), width), np.int32), np.zeros((len(ids), width), bool)
        for b, row in enumerate(ids):
            tokens[b, : len(row)], valid[b, : len(row)] = row, True
        return Chunk(tokens, valid)

    for i in range(max(count)):
        ids = [data.get(f"{row}/ctx{i}_ids", np.zeros(0, np.int32)) for row in rows]
        before = np.asarray(cache.tokens)
        cache, _ = read(model, cache, chunk(ids), method=method, query=False)
        raw = jax.device_get(cache)
        cache = compress(model, cache, np.array([len(row) > 0 for row in ids]), method=method)
        state = jax.device_get(cache)
        for b, row in enumerate(rows):
            if i >= count[b]:
                continue
            live = state.slots.live[b]
            place = raw.slots.position[b][raw.slots.live[b] & (raw.slots.index[b] >= before[b])]
            written = state.slots.position[b][state.slots.kind[b] == Kind.MEMORY][-len(method.closes) :]
            found[f"{row}/ctx{i}_ids"] = 0.0
            found[f"{row}/ctx{i}_pos"] = difference(place[-len(ids[b]) :], data[f"{row}/ctx{i}_pos"])
            found[f"{row}/comp{i}_pos"] = difference(written, data[f"{row}/comp{i}_pos"])
            found[f"{row}/offset{i}"] = difference(state.tokens[b], data[f"{row}/offset{i}"])
            for name in "kv":
                ours = np.moveaxis(getattr(state, name)[:, b, live], 1, 2)
                found[f"{row}/mem{i}_{name}"] = difference(ours, data[f"{row}/mem{i}_{name}"])
    ids = [data[f"{row}/query_target_ids"] for row in rows]
    _, logits = read(model, cache, chunk(ids), method=method, query=True)
    for b, row in enumerate(rows):
        found[f"{row}/query_target_ids"] = 0.0
        found[f"{row}/n_query"] = 0.0
        place = int(cache.tokens[b]) + np.arange(len(ids[b]))
        found[f"{row}/query_target_pos"] = difference(place, data[f"{row}/query_target_pos"])
        found[f"{row}/query_target_logits"] = difference(logits[b, : len(ids[b])], data[f"{row}/query_target_logits"])
    query = [data[f"{row}/query_target_ids"][: data[f"{row}/n_query"]] for row in rows]
    cache, _ = read(model, cache, chunk(query), method=method, query=True)
    recorded = {f"{row}/{name}": b for b, row in enumerate(rows) for name in ("greedy16", "official_generated")}
    recorded = {name: b for name, b in recorded.items() if name in data}
    _, tokens, _ = generate(model, cache, method=method, max_tokens=max(len(data[name]) for name in recorded))
    for name, b in recorded.items():
        found[name] = difference(tokens[b, : len(data[name])], data[name])
    return found


def check_stream(model: Transformer, method: Method, data: dict) -> dict[str, float]:
    """Losses, compressions and caches of a stream that is fed token by token."""
    # The last token is only a target.
    ids, last = data["ids"][:-1], data["ids"][-1:]
    events = data["events"]
    # A compressed stream closes the same number each time; the baseline drops so many that its size is the same.
    closes = np.full(len(events), CLOSES)
    if not method.closes:
        n = events[0, 2] - (events[0, 1] - CLOSES)
        grown = np.minimum(n * np.arange(1, len(events) + 1), CAPACITY)
        closes = CLOSES - np.diff(grown, prepend=0)
    cache = init_cache(model, method, 1, memory_capacity=CAPACITY, raw_capacity=WINDOW + 1, overflow="evict")
    snapshots = {f"cache_after_comp{i}": i for i in range(len(events)) if f"cache_after_comp{i}_k" in data}
    snapshots["last_cache"] = len(events) - 1
    found, nll, ours_events, done = {"ids": 0.0}, [], [], 0
    step = jax.jit(functools.partial(_stream_losses, method=method, window=WINDOW))
    # Between events the stream runs in one scan; the boundaries are the recorded ones and are checked below.
    position = 0
    while position < len(ids):
        size = WINDOW + 1 - int(cache.slots.live.sum())
        piece = ids[position : position + size]
        targets = np.append(ids, last)[position + 1 : position + 1 + size]
        padded = lambda x: np.pad(x, (0, WINDOW + 1 - len(x)))[None]
        valid = padded(np.ones(len(piece), bool))
        before = int(cache.slots.live.sum()) + len(piece)
        full = before > WINDOW
        cache, losses_ = step(
            model, cache, padded(piece), padded(targets), valid, closes=int(closes[done]) if full else CLOSES
        )
        nll.append(np.asarray(losses_)[0, : len(piece)])
        position += len(piece)
        if full:
            after = int(cache.slots.live.sum())
            ours_events.append((done, before, after, before - 1))
            for name, i in snapshots.items():
                if i == done:
                    found |= _cache_difference(name, jax.device_get(cache), data)
            done += 1
            if done >= len(closes):
                closes = np.append(closes, closes[-1])
    found["nll"] = difference(np.concatenate(nll), data["nll"])
    found["events"] = difference(np.array(ours_events), events)
    return found


def _stream_losses(
    model: Transformer, cache: MemoryCache, tokens, targets, valid, *, method: Method, window: int, closes: Array
):
    """Feeds text token by token, compressing whenever the window is full (CCM, section 4.3).

    Args:
      model: the decoder with its adapter.
      cache: the sessions; see `steps.stream_step`.
      tokens: ``int32 [B, T]``.
      targets: ``int32 [B, T]``, the token after each.
      valid: ``bool [B, T]``.
      method: static.
      window: live slots at which a row compresses; static.
      closes: how many of the oldest raw tokens are then compressed.

    Returns:
      The cache, and the negative log-likelihood of the targets, ``float32 [B, T]``, 0 where not valid.
    """

    def body(cache, scanned):
        token, target, use = scanned
        cache, logits = steps.stream_step(
            model, cache, Chunk(token[:, None], use[:, None]), method=method, window=window, closes=closes
        )
        return cache, cross_entropy(logits[:, 0], target) * use

    cache, losses = jax.lax.scan(body, cache, (jnp.swapaxes(tokens, 0, 1), jnp.swapaxes(targets, 0, 1), valid.T))
    return cache, losses.T


def _cache_difference(name: str, state, data: dict) -> dict[str, float]:
    live = state.slots.live[0]
    return {
        f"{name}_{x}": difference(np.moveaxis(getattr(state, x)[:, 0, live], 1, 2), data[f"{name}_{x}"]) for x in "kv"
    }


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        print(
            "usage: python -m tests.golden_check DIR    (a folder of *.npz cases, tiny models and adapters)",
            file=sys.stderr,
        )
        return 2
    failed = 0
    paths = sorted(Path(arguments[0]).glob("*.npz"))
    for path in paths:
        try:
            for name, value in check(path):
                bad = not value <= TOLERANCE
                failed += bad
                print(f"{path.stem:28} {name:90} {value:9.2e}{'  FAIL' if bad else ''}")
        except ValueError as e:
            failed += 1
            print(f"{path.stem:28} FAIL  {e}")
    print(f"{len(paths)} cases, {failed} arrays or cases differ by more than {TOLERANCE:g} or are not understood")
    return 1 if failed or not paths else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Memory files: what is written is read, whole or not at all, and nothing in a file is believed."""

from __future__ import annotations

import dataclasses
import os
import random

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jax_ccm.errors import UserError
from jax_ccm.memory import files, steps
from jax_ccm.memory.cache import init_cache
from jax_ccm.methods import build
from jax_ccm.nn import AdapterConfig, Transformer
from jax_ccm.records import sealed
from jax_ccm.rules.types import Chunk
from tests import cases

pytestmark = pytest.mark.once

MODEL = cases.model(tokens=2)
CONCAT, MERGE = build("ccm_concat", comp_tokens=2, sink=True), build("ccm_merge", comp_tokens=2, sink=True)
NAMES = dict(fingerprints={"base": "model", "adapter": "a"}, method=CONCAT)
ROOM = dict(memory_capacity=6, raw_capacity=8, overflow="error")


def sessions(model=MODEL, method=CONCAT, **sizes):
    """Two sessions that have closed a chunk, the first another."""
    cache = init_cache(model, method, 2, **(dict(memory_capacity=6, raw_capacity=8) | sizes))
    chunk = Chunk(np.arange(10, 18, dtype=np.int32).reshape(2, 4), np.ones((2, 4), bool))
    step = jax.jit(steps.compress_step, static_argnames="method")
    more = dataclasses.replace(chunk, valid=np.array([[True] * 4, [False] * 4]))
    return step(model, step(model, cache, chunk, method=method), more, method=method)


def alive(cache):
    """What counts of a cache: numbers of dead slots do not."""
    live = np.asarray(cache.slots.live)
    wipe = lambda x: np.where(live[None, ..., None, None], x, 0)
    return dataclasses.replace(jax.tree.map(np.asarray, cache), k=wipe(cache.k), v=wipe(cache.v))


@pytest.fixture(scope="module")
def state():
    return sessions()


@pytest.fixture
def path(state, tmp_path):
    files.save(state, tmp_path / "sessions.ccm", MODEL, **NAMES)
    return tmp_path / "sessions.ccm"


def change(path, arrays=None, **header):
    """Seals a file anew with other arrays and another header; None leaves one out."""
    found = sealed.Sealed(path, files.NAME)
    given = lambda held: {name: x for name, x in held.items() if x is not None}
    sealed.write(path, given(found.arrays() | (arrays or {})), given(found.header | header), files.NAME)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("method", [CONCAT, MERGE], ids=lambda method: method.name)
def test_files(tmp_path, dtype, method):
    """Every live number comes back, the float32 mixture of a bfloat16 model with the rest."""
    model = Transformer(jax.random.key(0), cases.CONFIG, AdapterConfig(tokens=2), dtype)
    state = sessions(model, method)
    digest = files.save(state, tmp_path / "m", model, **NAMES | {"method": method}, about={"name": "é"})
    loaded = files.load(tmp_path / "m", model, **NAMES | {"method": method})
    chex.assert_trees_all_equal(alive(state), alive(loaded))
    assert (loaded.mixed_k is None) == (method is CONCAT)
    held = files.read(tmp_path / "m")
    assert held.digest == digest and held.header["about"] == {"name": "é"} and held.arrays["live"].tolist() == (
        [5, 3] if method is CONCAT else [3, 3]
    )  # fmt: skip


def test_open_text_is_closed_alike_after_a_file(tmp_path):
    """What closing starts from (`MemoryCache.ids`) goes on from a file, too, and is not believed either."""
    method = build("ccm_concat", comp_tokens=2, start="mean")
    read, compress = (jax.jit(fn, static_argnames="method") for fn in (steps.read, steps.compress))
    text = Chunk(np.arange(20, 26, dtype=np.int32).reshape(2, 3), np.array([[True] * 3, [True, False, False]]))
    state, _ = read(MODEL, sessions(method=method), text, method=method)
    names = NAMES | {"method": method}
    files.save(state, tmp_path / "m", MODEL, **names)
    loaded = files.load(tmp_path / "m", MODEL, **names)
    here, there = (compress(MODEL, each, method=method) for each in (state, loaded))
    chex.assert_trees_all_equal(alive(here), alive(there))
    held = files.read(tmp_path / "m").arrays["ids"]
    assert sorted(held[held > 0].tolist()) == [20, 21, 22, 23]
    change(tmp_path / "m", dict(ids=np.full_like(held, cases.VOCAB)))
    with pytest.raises(UserError, match="slots are none"):
        files.load(tmp_path / "m", MODEL, **names)
    change(tmp_path / "m", dict(ids=None))
    with pytest.raises(UserError, match="nothing as 'ids'; this model and method have int32"):
        files.load(tmp_path / "m", MODEL, **names)


def test_bytes_are_those_of_live_slots(state, path):
    """A cache of a hundred times the capacity makes the same file, and a session goes on in any that has room."""
    size = path.stat().st_size
    files.save(sessions(memory_capacity=600, raw_capacity=800), path, MODEL, **NAMES)
    assert abs(path.stat().st_size - size) < 100
    small = files.load(path, MODEL, **NAMES, memory_capacity=4, raw_capacity=3)
    assert small.k.shape[2] == 8
    read = jax.jit(steps.read, static_argnames=("method", "query"))
    chunk = Chunk(np.array([[5, 6], [7, 8]], np.int32), np.ones((2, 2), bool))
    logits = [read(MODEL, cache, chunk, method=CONCAT, query=True)[1] for cache in (state, small)]
    np.testing.assert_allclose(*logits, atol=1e-5)
    with pytest.raises(UserError, match="4 slots of memory and 1 of other text; here is room for memory_capacity=3"):
        files.load(path, MODEL, **NAMES, memory_capacity=3, raw_capacity=8)


def test_of_another_model_or_method(path):
    for other in ({"base": "other", "adapter": "a"}, {"adapter": "a"}):
        with pytest.raises(UserError, match="written with base 'model'; this session uses base"):
            files.load(path, MODEL, fingerprints=other, method=CONCAT)
    with pytest.raises(UserError, match="written with method .*ccm_concat.* They differ in"):
        files.load(path, MODEL, **NAMES | {"method": MERGE})
    with pytest.raises(UserError, match="cannot be read"):
        files.load(path.with_name("missing"), MODEL, **NAMES)
    with pytest.raises(UserError, match="float32 .* as 'k'; this model and method have bfloat16"):
        files.load(path, cases.CONFIG, **NAMES, dtype=jnp.bfloat16)
    with pytest.raises(UserError, match="float32 .*8. as 'k'; this model and method have .*16"):
        files.load(path, dataclasses.replace(cases.CONFIG, head_dim=16), **NAMES, dtype=jnp.float32)


@pytest.mark.parametrize(
    "arrays, header, message",
    [
        (dict(k=np.zeros((3, 8, 2, 4), np.float32)), {}, r"\[3, 8, 2, 4\] as 'k', .* \[3, 8, 2, 8\]"),
        (dict(v=np.zeros((3, 8, 2, 8), np.float16)), {}, "float16 .* as 'v'"),
        (dict(chunks=np.zeros(3, np.int32)), {}, "as 'chunks'"),
        (dict(logits=None), {}, "holds nothing as 'logits'"),
        (dict(more=np.zeros(3, np.int32)), {}, "as 'more', and its header has nothing"),
        (dict(live=np.array([4, 3], np.int32)), {}, "slots are none"),
        (dict(live=np.array([9, -1], np.int32)), {}, "slots are none"),
        (dict(kind=np.full(8, -7, np.int32)), {}, "slots are none"),
        (dict(index=np.arange(8, 0, -1, dtype=np.int32)), {}, "slots are none"),
        (dict(k=np.full((3, 8, 2, 8), np.nan, np.float32)), {}, "not finite as 'k'"),
        ({}, dict(sessions=2**40), "how many sessions"),
        ({}, dict(memory_capacity="6"), "how many sessions"),
        ({}, dict(memory_capacity=1), "memory_capacity is 1"),
        ({}, dict(overflow="drop"), "overflow is 'drop'"),
        ({}, dict(method=None), "does not say which method"),
        ({}, dict(model={}), "which model"),
        ({}, dict(fingerprints=[1]), "what it belongs to"),
        ({}, dict(format="jax_ccm.memory/9"), "not a memory file of this library"),
    ],
)  # fmt: skip
def test_nothing_in_a_file_is_believed(path, arrays, header, message):
    """A digest that is right makes nothing true."""
    change(path, arrays, **header)
    with pytest.raises(UserError, match=message):
        files.load(path, MODEL, **NAMES)


def mutate(rng: random.Random, content: bytes) -> bytes:
    """Damage of many kinds: bits, bytes, cuts, holes, doubles, and most often in the header."""
    made = bytearray(content)
    end = len(made) if rng.random() < 0.4 else 2000
    for _ in range(rng.choice((1, 1, 1, 3, 40))):
        at, size = rng.randrange(min(end, len(made) or 1)), rng.choice((1, 1, 4, 64))
        match rng.randrange(7):
            case 0:
                made[at : at + 1] = bytes([(made[at] if at < len(made) else 0) ^ 1 << rng.randrange(8)])
            case 1:
                made[at : at + size] = rng.randbytes(size)
            case 2:
                del made[at : at + size]
            case 3:
                made[at:at] = made[at : at + size]
            case 4:
                del made[at:]
            case 5:
                made[at : at + size] = bytes(size)
            case 6:
                made[at : at + 1] = rng.choice((b"[", b'"', b"9999999999", b"-1", b"}", b"\xff", b"null"))
    return bytes(made)


def fuzz(path, count: int, seed: int) -> dict[str, int]:
    """Loads damaged files, every second one with a digest that is right; what came of them."""
    rng, content, came = random.Random(seed), path.read_bytes(), {"refused": 0, "loaded": 0, "unchanged": 0}
    for number in range(count):
        made = mutate(rng, content)
        resealed = number % 2 and sealed._DIGEST.search(made[8:]) is not None
        if resealed:
            blank = sealed._DIGEST.sub(b'"digest":"' + b"0" * 64 + b'"', made)
            made = blank.replace(b"0" * 64, sealed.hashlib.sha256(blank).hexdigest().encode(), 1)
        path.write_bytes(made)
        if made == content:
            came["unchanged"] += 1
            continue
        try:
            files.load(path, MODEL, **NAMES, **ROOM)
        except UserError:
            came["refused"] += 1
        else:
            assert resealed, f"a damaged file was loaded (seed {seed}, number {number})"
            came["loaded"] += 1
    return came


@pytest.mark.filterwarnings("ignore:.*is of an earlier version")
def test_damaged_files_are_refused(path):
    """No damage crashes, hangs or loads, unless somebody made the digest anew; then what loads is a valid session."""
    came = fuzz(path, int(os.environ.get("JAX_CCM_FUZZ", 300)), seed=1)
    assert came["refused"] > 0.7 * sum(came.values()), came
    print(came)


def test_what_is_no_file(tmp_path):
    """A folder, and a pipe that nobody writes to, are not waited for."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").touch()
    for name in ("", "pipe", "empty"):
        with pytest.raises(UserError, match="cannot be read"):
            files.read(tmp_path / name)


def test_a_file_is_whole_or_as_it_was(state, path, monkeypatch):
    """What fails in the middle of writing leaves the file that was there, and nothing beside it."""
    before = path.read_bytes()

    def fails(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(sealed.os, "fsync", fails)
        with pytest.raises(UserError, match="sessions.ccm cannot be written: .*No space left"):
            files.save(state, path, MODEL, **NAMES)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["sessions.ccm"]
    with pytest.raises(UserError, match="cannot be written"):
        files.save(state, path / "below", MODEL, **NAMES)


def test_invalid_sessions_are_not_written(state, tmp_path):
    for changes in (dict(lost=state.lost + 1), dict(spoiled=~state.spoiled)):
        with pytest.raises(UserError, match=r"sessions \[0, 1\]"):
            files.save(dataclasses.replace(state, **changes), tmp_path / "never", MODEL, **NAMES)
    assert not list(tmp_path.iterdir())


def test_metadata_that_is_nested_too_deep(path):
    save_file(load_file(path), path, {"jax_ccm": "[" * 100_000})
    with pytest.raises(UserError, match="nested too deep"):
        files.load(path, MODEL, **NAMES)

"""The search for what fits, topologies, and work by formula."""

from __future__ import annotations

import jax
import pytest

from jax_ccm.benchmarks import baselines
from jax_ccm.config.loading import build_method, scratch_model
from jax_ccm.config.schema import from_mapping
from jax_ccm.errors import UserError
from jax_ccm.nn import abstract_transformer
from jax_ccm.planning import chips, costs, measure, programs, sessions
from jax_ccm.rules.types import Kind
from jax_ccm.weights.hf import base_parameters
from tests.benchmarks.test_baselines import GIVEN, REFUSED


def needing(size: int, fixed: int, each: float, limit: int, cliff: int = 10**9) -> measure.Need:
    total = int(fixed + each * size) + (limit if size >= cliff else 0)
    return measure.Need(total <= limit, total, {}, [], 0.0)


@pytest.mark.parametrize(
    ("step", "guess", "fixed", "each", "cliff", "most"),
    [
        (16, 900, 1000, 10.0, 10**9, 896),  # (10000 - 1000) / 10 = 900
        (16, 16, 1000, 10.0, 10**9, 896),
        (16, 5000, 1000, 10.0, 10**9, 896),
        (1, 300, 0, 10.0, 10**9, 1000),
        (8, 64, 9990, 10.0, 10**9, 0),  # not even one step
        (1, 100, 0, 10.0, 500, 499),  # the line lies
    ],
)
def test_largest(step, guess, fixed, each, cliff, most):
    calls = []

    def needs(size):
        calls.append(size)
        return needing(size, fixed, each, 10_000, cliff)

    found, tried = measure.largest(needs, step=step, guess=guess, limit=10_000)
    assert found % step == 0 and (not found or tried[found].fits)
    assert most * (1 - measure.PRECISION) - step < found <= most
    beyond = min(size for size, need in tried.items() if not need.fits)
    assert beyond - found <= max(step, found * measure.PRECISION)
    assert len(calls) == len(set(calls)) < 15


@pytest.mark.parametrize("topology", ["v5e", "v5e:4", "4x4", "v5e:4x4x"])
def test_bad_topologies(topology):
    with pytest.raises(UserError, match="such as v5e:4x4"):
        chips.parse(topology)


def test_unknown_chips():
    with pytest.raises(UserError, match="unknown chip 'v9'.*v5e, v5p, v6e"):
        chips.parse("v9:4x4")
    assert chips.parse("v5p:2x2x2") == ("v5p", (2, 2, 2))


def test_without_the_compiler(monkeypatch):
    monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'libtpu==0\.0\.\d+\.\*' --no-deps"):
        chips.devices("v5e:4x4")


def test_weights_are_counted():
    config = from_mapping({"model": {"scratch": {"vocab_size": 50, "layers": 3, "kv_heads": 1}}})
    shape = scratch_model(config.model.scratch)
    kernels = {p: x for p, x in base_parameters(abstract_transformer(shape)).items() if p.endswith("kernel")}
    layers = sum(x.size for path, x in kernels.items() if path.startswith("layers."))
    assert shape.layer_weights == layers


def test_training_cost():
    """Frozen weights: 2 passes of 2 P each, a third with remat; trained ones 3, as the usual 6 P a token."""
    tree = {
        "model": {"scratch": {"vocab_size": 50}, "precision": "float32"},
        "data": {"tokens": 16, "scored": 4, "max_chunks": 2},
    }
    config = from_mapping(tree)
    trained = from_mapping(tree | {"train": {"trainable": "all", "remat": "all"}})
    shape = scratch_model(config.model.scratch)
    weights = shape.layer_weights

    def per_token(config):
        batch = programs.abstract_batch(config, shape, build_method(config), 2)
        cost = costs.training_cost(config, shape, batch, 3, 1)
        rows, length, memory = 6, 16, batch.memory.source.shape[1]
        passes = 4 + (config.train.remat == "all")
        attention = passes * shape.forward_flops(0, rows * length * (length + memory), 0)
        head = (
            2 * (4 if config.train.trainable == "all" else 2) * shape.hidden_size * 50 * rows * batch.indices.shape[1]
        )
        return (cost.flops - attention - head) / (rows * length * weights)

    assert per_token(config) == pytest.approx(4)
    assert per_token(trained) == pytest.approx(8)


def test_sessions_of_each_system():
    """Slots of a session: 16 chunks of 50 tokens with n = 8, and 32 raw tokens."""
    config = from_mapping({"method": {"name": "ccm_merge", "comp_tokens": 8, "independent": True}})
    setting = sessions.Setting(16, 50, 32)
    found = {name: sum(sessions.room(m, setting)) for name, m in sessions.systems(config).items()}
    assert found == {"full": 832, "concat": 160, "merge": 40}


@pytest.mark.parametrize(("name", "options"), GIVEN, ids=str)
def test_sessions_are_counted_for_the_method_of_the_config(name, options):
    """With every option, or it is refused; bytes of a session are those of the cache that it has."""
    config = from_mapping(
        {"model": {"scratch": {"vocab_size": 50}, "precision": "float32"}, "method": {"name": name} | options}
    )
    if name in REFUSED and not options.get("online"):
        with pytest.raises(UserError, match=REFUSED[name]):
            sessions.systems(config)
        return
    method = build_method(config)
    assert method in sessions.systems(config).values() and "full" in sessions.systems(config)
    slots, raw = sessions.room(method, sessions.Setting(16, 12, 8))
    shape = scratch_model(config.model.scratch)
    mesh = programs.sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1, "context": 1}, jax.devices()[:1])
    cache = programs.abstract_cache(config, shape, method, mesh, 3, slots, raw)
    live = baselines.slots_after(method, 16, 12).kind
    assert (live == Kind.MEMORY).sum() <= slots and (live != Kind.MEMORY).sum() <= raw + method.sink
    assert cache.nbytes == programs.device_bytes(cache) > 3 * slots * shape.kv_bytes_per_slot(4)


def test_abstract_programs_take_no_memory():
    """What is compiled are the real steps: a one-device mesh, and bytes by kind as the shapes say."""
    config = from_mapping(
        {
            "model": {"scratch": {"vocab_size": 50}, "precision": "float32"},
            "data": {"tokens": 16, "scored": 4, "max_chunks": 2},
        }
    )
    shape, method = scratch_model(config.model.scratch), build_method(config)
    mesh = programs.sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1, "context": 1}, jax.devices()[:1])
    program = programs.training_step(config, shape, method, mesh, 2, 3)
    assert program.arguments[2].tokens.shape == (3, 2, 16)
    adapter, optimizer = (programs.device_bytes(program.kinds[name]) for name in ("adapter", "optimizer"))
    assert 2 * adapter < optimizer <= 2 * adapter + 64
    found = measure.need(program, chips.CHIPS["v5e"])
    assert found.fits and not found.collectives
    assert found.bytes >= sum(size for kind, size in found.kinds.items() if kind not in ("temporaries", "other"))


@pytest.mark.parametrize(("room", "expected"), [(0, 0), (10, 10), (20, 20)])
def test_most_sessions(monkeypatch, room, expected):
    """Both steps must fit; nothing is compiled twice, and nothing for no sessions."""
    config = from_mapping({"model": {"scratch": {"vocab_size": 50}, "precision": "float32"}})
    shape = scratch_model(config.model.scratch)
    mesh = programs.sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1, "context": 1}, jax.devices()[:1])
    asked = []

    def need(program, chip):
        count = program.arguments[1].tokens.shape[0]
        asked.append((program.function, count))
        # Reading a token needs more than closing a chunk, which 20 sessions could.
        fits = count <= (room if "decode" in said[-1] else max(room, 20) if room else 0)
        return measure.Need(fits, count, {"cache": count, "weights": 1}, [], 0.0)

    said = [""]
    real = {name: getattr(programs, name) for name in ("compress_step", "decode_step")}
    for name, make in real.items():

        def step(*arguments, name=name, make=make):
            said.append(name)
            return make(*arguments)

        step.__name__ = name
        monkeypatch.setattr(programs, name, step)
    monkeypatch.setattr(sessions, "need", need)
    method = sessions.systems(from_mapping({"method": {"name": "ccm_merge"}}))["merge"]
    found = sessions.most_sessions(
        config, shape, method, sessions.Setting(2, 5, 4), mesh, chips.CHIPS["v5e"], lambda line: None
    )
    assert found["sessions"] == expected and all(count for _, count in asked)
    assert len(set(zip(said[1:], (count for _, count in asked), strict=True))) == len(asked)
    assert set(found["steps"]) == ({"compress_step", "decode_step"} if expected else set())

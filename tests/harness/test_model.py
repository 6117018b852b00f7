"""The harness's requests, answered as by hand from each session alone; and the harness itself on tasks of our own."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="no lm-evaluation-harness: pip install '.[lm-eval]'")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from jax_ccm.config.loading import load_experiment
from jax_ccm.errors import UserError
from jax_ccm.evals import recurrent
from jax_ccm.evals.prompts import Settings, windows
from jax_ccm.harness import HarnessModel, tasks
from jax_ccm.memory.cache import init_cache
from jax_ccm.memory.generation import generate
from jax_ccm.methods import build
from jax_ccm.rules.rows import chunk
from tests import jitted, pretrained
from tests.harness import support

pytestmark = pytest.mark.once

BOS = 0
# What is asked behind a context of two paragraphs, twice the same one; without borders; and of nothing.
ASKED = [
    (context, answer)
    for context in ("Ann likes red.\n\nBob is home.\n\nWhat does Ann like?", "It is late.\n\nWho is?", "What?", "")
    for answer in (" red", " blue!")
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a base, an adapter whose B is not zero, a config and tasks; and what they are loaded as."""
    folder = tmp_path_factory.mktemp("harness")
    config = support.trained(folder)
    for write in (support.choices, support.generation, support.texts):
        write(folder)
    return folder, load_experiment(config, adapter=folder / "adapter")


@pytest.fixture(scope="module")
def known(trained):
    """All tasks of the harness, and ours."""
    return tasks.open_tasks(["colours", "saying", "novel"], trained[0])


@pytest.fixture(scope="module")
def experiment(trained):
    return trained[1]


def requests(kind: str, *arguments) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=given, idx=i) for i, given in enumerate(arguments)]


def likelihood(logits, tokens: list[int]) -> tuple[float, bool]:
    """Of tokens, by the logits ``[n, V]`` in front of each."""
    found = jax.nn.log_softmax(logits)[np.arange(len(tokens)), np.array(tokens)]
    return float(found.sum()), bool((logits.argmax(-1) == np.array(tokens)).all())


def by_hand(model: HarnessModel, closed: list[str], text: str, answer: str):
    """Likelihood of an answer behind a text, behind chunks that were closed one by one, in a session of its own."""
    method, coder = model.system.method, model.tokenizer
    pad = lambda tokens: chunk([tokens], 64, model.experiment.model_config.vocab_size)
    cache = init_cache(model.system.model, method, 1, memory_capacity=8, raw_capacity=256)
    for piece in closed:
        cache = jitted.compress_step(model.system.model, cache, pad(coder(piece)["input_ids"]), method=method)
    before, asked = coder(text)["input_ids"] or [BOS], coder(answer)["input_ids"]
    _, logits = jitted.read(model.system.model, cache, pad(before + asked), method=method, query=True)
    return likelihood(np.asarray(logits)[0, len(before) - 1 : len(before) + len(asked) - 1], asked)


def test_full_context_is_the_plain_forward(experiment):
    """All text in one read of the base, to 1e-5 of each log-likelihood; in the order of the requests."""
    full = HarnessModel(experiment, "full")
    found = full.loglikelihood(requests("loglikelihood", *ASKED), disable_tqdm=True)
    expected = [by_hand(full, [], context, answer) for context, answer in ASKED]
    assert [hit for _, hit in found] == [hit for _, hit in expected]
    assert [x for x, _ in found] == pytest.approx([x for x, _ in expected], rel=1e-5)
    assert full.slots == full.tokens > 0 and full.requests == len(ASKED)


def test_no_context_is_the_last_paragraph(experiment):
    none = HarnessModel(experiment, "none")
    found = none.loglikelihood(requests("loglikelihood", *ASKED), disable_tqdm=True)
    expected = [by_hand(none, [], context.split("\n\n")[-1], answer) for context, answer in ASKED]
    assert [x for x, _ in found] == pytest.approx([x for x, _ in expected], rel=1e-5) and none.slots == 0


def test_memory_closes_paragraphs_and_reads_each_context_once(experiment, monkeypatch):
    memory = HarnessModel(experiment)
    reads, step = [], recurrent._step
    monkeypatch.setattr(recurrent, "_step", lambda *args, **kw: reads.append(kw["close"]) or step(*args, **kw))
    closed = ["Ann likes red, and has done so for many a year.\n\n", "Bob is at home, where it is warm and dry.\n\n"]
    asked = [("".join(closed) + text, answer) for text in ("Ann?", "Bob?") for answer in (" red", " at home", " blue")]
    found = memory.loglikelihood(requests("loglikelihood", *asked), disable_tqdm=True)
    assert sum(reads) == 2  # two chunks, for three answers to each of two questions
    expected = [by_hand(memory, closed, context.split("\n\n")[-1], answer) for context, answer in asked]
    assert [x for x, _ in found] == pytest.approx([x for x, _ in expected], rel=1e-5)
    assert memory.slots == len(asked) * 2 * 2 and memory.tokens == len(asked) * sum(map(len, closed))
    assert memory.get_model_info()["context_slots"] == memory.slots
    # Another context says something else; so does none.
    wrong = HarnessModel(experiment, "wrong")
    both = [asked[0], ("Zoe\n\nWho?", " me")]
    (swapped, _), _ = wrong.loglikelihood(requests("loglikelihood", *both), disable_tqdm=True)
    assert swapped == pytest.approx(by_hand(wrong, ["Zoe\n\n"], "Ann?", " red")[0], rel=1e-5)
    assert abs(swapped - found[0][0]) > 1e-3


def test_answers_are_those_of_each_session_alone(experiment):
    """Made side by side, from memory, up to a text that ends them; the rest of what was made is cut off."""
    memory = HarnessModel(experiment, settings=Settings(batch_size=3))
    asked = [text for text, _ in ASKED[::2]][:3]
    model, method, coder = memory.system.model, experiment.method, memory.tokenizer
    pad = lambda text: chunk([coder(text)["input_ids"]], 64, experiment.model_config.vocab_size)
    whole = []
    for text in asked:
        *closed, last = text.split("\n\n")
        cache = init_cache(model, method, 1, memory_capacity=8, raw_capacity=256)
        for piece in closed:
            cache = jitted.compress_step(model, cache, pad(piece + "\n\n"), method=method)
        cache, _ = jitted.read(model, cache, pad(last), method=method, query=True)
        how = dict(method=method, max_tokens=40, stop_tokens=experiment.ends, vocabulary=len(coder))
        _, tokens, lengths = generate(model, cache, **how)
        whole.append(coder.decode(np.asarray(tokens)[0, : int(lengths[0])], skip_special_tokens=True))
    say = lambda **how: memory.generate_until(requests("generate_until", *((text, how) for text in asked)))
    assert say(until=[], max_gen_toks=40) == whole
    until = whole[0][9:11]
    assert say(until=[until], max_gen_toks=40) == [text.split(until)[0] for text in whole]
    assert say(until=until, max_new_tokens=5) == say(until=[until], max_gen_toks=5)


def test_draws_depend_on_the_seed_and_not_on_the_neighbours(experiment):
    asked = [(text, {"until": [], "max_gen_toks": 6, "do_sample": True, "temperature": 2.0}) for text, _ in ASKED[:5:2]]
    say = lambda **how: HarnessModel(experiment, settings=Settings(**how)).generate_until(
        requests("generate_until", *asked)
    )
    first = say(batch_size=3)
    assert say(batch_size=2) == first and say(batch_size=3, seed=1) != first
    greedy = [(text, {**how, "do_sample": False}) for text, how in asked]
    assert HarnessModel(experiment).generate_until(requests("generate_until", *greedy)) != first


def test_whole_texts(experiment):
    """Full context in the harness's own windows; memory from end to end; no context in windows of a chunk."""
    text = "Ann went out. Bob came home, and so did Cid. " * 2
    tokens = HarnessModel(experiment).tok_encode(text)
    for size in range(1, 12):
        theirs = [make_disjoint_window(x) for x in get_rolling_token_windows(tokens[:9], BOS, size, 1)]
        assert [(a.tolist(), b.tolist()) for a, b in windows(np.array(tokens[:9]), BOS, size)] == theirs
    asked = requests("loglikelihood_rolling", (text,), ("",), (text[:20],))
    full = HarnessModel(experiment, "full", Settings(max_length=32, chunk=16))
    (found, nothing, short) = full.loglikelihood_rolling(asked)
    parts = [make_disjoint_window(x) for x in get_rolling_token_windows(tokens, BOS, 32, 1)]
    expected = 0.0
    for before, scored in parts:
        cache = init_cache(full.system.model, full.system.method, 1, memory_capacity=1, raw_capacity=64)
        pad = chunk([before + scored], 64, experiment.model_config.vocab_size)
        _, logits = jitted.read(full.system.model, cache, pad, method=full.system.method, query=True)
        n = len(before)
        expected += likelihood(np.asarray(logits)[0, n - 1 : n + len(scored) - 1], scored)[0]
    assert found == pytest.approx(expected, rel=1e-5) and nothing == 0.0 > short
    memory = HarnessModel(experiment, settings=Settings(chunk=16)).loglikelihood_rolling(asked)
    none = HarnessModel(experiment, "none", Settings(chunk=32)).loglikelihood_rolling(asked)
    assert none == pytest.approx([found, nothing, short], rel=1e-5)
    assert memory[0] != pytest.approx(found, rel=1e-4) and memory[1] == 0.0
    with pytest.raises(UserError, match="'wrong' answers no task that scores whole texts"):
        HarnessModel(experiment, "wrong").loglikelihood_rolling(asked)


def test_full_context_loses_the_oldest_and_says_so(experiment, caplog):
    full = HarnessModel(experiment, "full", Settings(max_length=12))
    (found,) = full.loglikelihood(requests("loglikelihood", ASKED[0]), disable_tqdm=True)
    text, answer = ASKED[0]
    assert found[0] == pytest.approx(by_hand(full, [], text[len(answer) - 13 :], answer)[0], rel=1e-5)
    assert full.truncated == 1 and "goes beyond max_length=12" in caplog.text
    with pytest.raises(UserError, match="what is asked for takes all of max_length=12.*lower max_gen_toks"):
        full.generate_until(requests("generate_until", (text, {"until": [], "max_gen_toks": 12})))


def test_the_same_as_their_own_model(trained):
    """Log-likelihoods, windows, truncation and greedy answers of the harness's `hf` model of the same files."""
    pytest.importorskip("torch", reason="torch is not installed; pip install torch accelerate")
    pytest.importorskip("accelerate", reason="accelerate is not installed; pip install torch accelerate")
    from lm_eval.models.huggingface import HFLM

    folder, experiment = trained
    theirs = HFLM(pretrained=str(folder / "base"), device="cpu", dtype="float32", max_length=60, batch_size=2)
    ours = HarnessModel(experiment, "full", Settings(max_length=60, chunk=16))
    asked = requests("loglikelihood", *ASKED, ("long " * 30 + "\n\nend ", " yes"))
    expected, found = theirs.loglikelihood(asked), ours.loglikelihood(asked)
    assert [hit for _, hit in found] == [hit for _, hit in expected]
    assert [x for x, _ in found] == pytest.approx([x for x, _ in expected], rel=1e-5)
    texts = requests("loglikelihood_rolling", ("short",), ("some text " * 20,), ("z" * 121,))
    assert ours.loglikelihood_rolling(texts) == pytest.approx(theirs.loglikelihood_rolling(texts), rel=1e-5)
    how = {"until": ["e"], "max_gen_toks": 20}
    prompts = requests("generate_until", *((text, how) for text in ("short", "some text " * 20, "z" * 121)))
    assert ours.generate_until(prompts) == theirs.generate_until(prompts)


def test_messages_are_cut_at_turns(experiment):
    """With a chat template: each example, a turn and its answer, is a chunk; the system message stands in front."""
    coder = pretrained.tokenizer()
    coder.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    model = HarnessModel(dataclasses.replace(experiment, tokenizer=coder))
    said = [("system", "Be brief."), ("user", "a\n\nb"), ("assistant", "c"), ("user", "d")]
    text = model.apply_chat_template([{"role": role, "content": content} for role, content in said])
    session = model.cutting.session(experiment.method, model._prompt(text))
    decode = lambda tokens: "".join(coder.convert_ids_to_tokens(tokens)).replace("Ġ", " ").replace("Ċ", "\n")
    assert decode(session.start) == "[system]Be brief.\n"
    shown = [decode(segment.tokens) for segment in session.segments]
    assert shown == ["[user]a\n\nb\n[assistant]c\n", "[user]d\n[assistant]"]
    assert model.chat_template(True) == coder.chat_template
    with pytest.raises(UserError, match="no chat template"):
        HarnessModel(experiment).apply_chat_template([])


def test_the_harness_runs_it_by_name(trained, known):
    """`simple_evaluate` with ``model="jax_ccm"``: all kinds of tasks, and numbers that are those of single requests."""
    folder, experiment = trained
    given = f"config={folder}/mine.yaml,adapter={folder}/adapter,chunk=32,delimiter=\\n\\n"
    results = lm_eval.simple_evaluate(
        model="jax_ccm", model_args=given, tasks=["colours", "saying", "novel"], task_manager=known, num_fewshot=1,
        limit=3, batch_size=2, bootstrap_iters=0,
    )  # fmt: skip
    assert set(results["results"]) == {"colours", "saying", "novel"}
    about = results["config"]
    assert about["system"] == "memory" and about["chunk"] == 32 and about["delimiter"] == "\n\n"
    assert 0 < about["context_slots"] < about["context_tokens"] and about["batch_size"] == 2
    memory = HarnessModel(experiment, settings=Settings(chunk=32))
    for sample in results["samples"]["colours"]:
        asked = [(line["arg_0"], line["arg_1"]) for line in sample["arguments"].values()] if isinstance(
            sample["arguments"], dict) else sample["arguments"]  # fmt: skip
        found = memory.loglikelihood(requests("loglikelihood", *asked), disable_tqdm=True)
        told = [float(x) for ((x, _),) in sample["resps"]]
        assert [x for x, _ in found] == pytest.approx(told, rel=1e-5)
    texts = [json.loads(line)["text"] for line in (folder / "novel.jsonl").read_text().splitlines()[:3]]
    total = sum(memory.loglikelihood_rolling(requests("loglikelihood_rolling", *((text,) for text in texts))))
    bits = -total / np.log(2) / sum(len(text.encode()) for text in texts)
    assert results["results"]["novel"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "name nothing to load; give adapter=NAME"),
        ("adapter=x,chunks=3", r"unknown model_args 'chunks'; did you mean 'chunk'\?"),
        ("adapter=x,batch_size=auto", "batch_size is 'auto'; give a whole number"),
        ("adapter=x,chunk=-3", "chunk is -3"),
        ("adapter=x,device=cuda", "device, which is not ours to choose; JAX_PLATFORMS"),
        ("adapter=not-there-at-all", "'not-there-at-all' is no YAML file.* and no adapter"),
    ],
)
def test_arguments_that_cannot_be(given, message):
    with pytest.raises(UserError, match=message):
        lm_eval.api.registry.get_model("jax_ccm").create_from_arg_string(given, {"batch_size": 1, "device": None})


def test_requests_that_cannot_be(experiment, known):
    with pytest.raises(UserError, match=r"unknown system 'ful'; did you mean 'full'\?"):
        HarnessModel(experiment, "ful")
    model = HarnessModel(experiment)
    with pytest.raises(UserError, match="unknown option of generation.*'num_beams'"):
        model.generate_until(requests("generate_until", ("hi", {"until": [], "num_beams": 4})))
    with pytest.raises(UserError, match="the continuation '' of 'hi' has no token"):
        model.loglikelihood(requests("loglikelihood", ("hi", "")), disable_tqdm=True)
    with pytest.raises(UserError, match="a prompt is empty"):
        model.generate_until(requests("generate_until", ("", {"until": []})))
    with pytest.raises(UserError, match="no tokenizer"):
        HarnessModel(dataclasses.replace(experiment, tokenizer=None))
    with pytest.raises(UserError, match=r"no task 'hellaswig' \(there is hellaswag"):
        tasks.require(known, ["colours", "hellaswig"])
    with pytest.raises(UserError, match="include_path is /not/there"):
        tasks.open_tasks([], Path("/not/there"))


def test_eviction_needs_no_adapter(trained):
    """A method without training serves as memory, too."""
    _, experiment = trained
    evict = HarnessModel(dataclasses.replace(experiment, method=build("evict", slots=4)))
    (found,) = evict.loglikelihood(requests("loglikelihood", ASKED[0]), disable_tqdm=True)
    assert np.isfinite(found[0]) and 0 < evict.slots < evict.tokens

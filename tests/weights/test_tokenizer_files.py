"""A folder's tokenizer is what its tokenizer.json says, whatever class the folder names."""

import json

import pytest
from tokenizers import Tokenizer

from jax_ccm.errors import UserError
from jax_ccm.weights import load_tokenizer
from tests.weights.layouts import LAYOUTS, TEXTS

CLASSES = (
    "LlamaTokenizerFast", "LlamaTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend", "GPT2TokenizerFast",
    "Qwen2TokenizerFast", "GemmaTokenizerFast", "T5TokenizerFast", "NoSuchTokenizer", None,
)  # fmt: skip


def folder(path, layout: str, **config):
    path.mkdir(exist_ok=True)
    LAYOUTS[layout]().save(str(path / "tokenizer.json"))
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    given = {name: value for name, value in config.items() if value is not None}
    (path / "tokenizer_config.json").write_text(json.dumps(given))
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_class_changes_what_the_file_says(layout, tmp_path):
    """LlamaTokenizerFast over a byte-level file lost all spaces, and even Llama 2's own layout was cut differently."""
    file = Tokenizer.from_str(LAYOUTS[layout]().to_str())
    file.no_truncation()  # transformers does both, or neither, by the arguments of a call
    file.no_padding()
    plain = {text: file.encode(text, add_special_tokens=False).ids for text in TEXTS}
    whole = {text: file.encode(text).ids for text in TEXTS}
    first, last = file.id_to_token(1), file.id_to_token(2)
    ends = [{}, dict(add_bos_token=True, add_eos_token=True), dict(add_bos_token=False, add_prefix_space=True)]
    for name in CLASSES:
        for more in ends[: 1 if name is None else None]:
            path = folder(tmp_path / "f", layout, tokenizer_class=name, bos_token=first, eos_token=last, **more)
            tokenizer = load_tokenizer(path)
            for text in TEXTS:
                assert tokenizer(text, add_special_tokens=False)["input_ids"] == plain[text], (name, more, text)
                assert tokenizer(text)["input_ids"] == whole[text], (name, more, text)
                assert tokenizer.decode(plain[text]) == file.decode(plain[text], skip_special_tokens=False), (
                    name,
                    more,
                )
            assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


def test_names_template_and_tokens_of_the_folder_stay(tmp_path):
    added = {str(500 + i): {"content": f"<|{i}|>", "special": i == 0} for i in range(2)}
    path = folder(
        tmp_path / "f",
        "qwen2",
        tokenizer_class="Qwen2TokenizerFast",
        **dict(eos_token="<|im_end|>", pad_token="<|0|>", model_max_length=77, added_tokens_decoder=added),
    )
    (path / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    tokenizer = load_tokenizer(path)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.model_max_length) == (2, 500, 77)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi!"
    assert tokenizer("<|0|><|1|>")["input_ids"] == [500, 501]
    assert tokenizer.decode([500, 501], skip_special_tokens=True) == "<|1|>"
    assert tokenizer.bos_token is None


def test_names_that_the_folder_leaves_to_its_class(tmp_path):
    """As in GPT-2's folder; what the file does not hold is no name."""
    tokenizer = load_tokenizer(folder(tmp_path / "gpt2", "smollm", tokenizer_class="GPT2TokenizerFast"))
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == 0 and len(tokenizer) == 500
    tokenizer = load_tokenizer(folder(tmp_path / "llama", "llama3", tokenizer_class="LlamaTokenizerFast"))
    assert tokenizer.eos_token is None and tokenizer.bos_token is None and len(tokenizer) == 500


def test_files_that_do_not_belong_together(tmp_path):
    path = folder(tmp_path / "f", "qwen2", added_tokens_decoder={"700": {"content": "<|far|>", "special": True}})
    with pytest.raises(UserError, match=r"'<\|far\|>' has id 700 in tokenizer_config.json, but 500 when"):
        load_tokenizer(path)
    (path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(UserError, match="tokenizer.json' is no tokenizer of the tokenizers library"):
        load_tokenizer(path)
    (path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="A tokenizer.json is needed"):
        load_tokenizer(path)

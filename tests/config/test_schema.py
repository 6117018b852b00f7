"""Configs: strict reading, overrides, and that nothing in them is idle."""

from __future__ import annotations

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from jax_ccm.config import cli, schema
from jax_ccm.config.schema import Config, from_mapping, load_config, save_config
from jax_ccm.data.config import BY_FORMAT, OnlineConfig, TextConfig
from jax_ccm.distributed import sharding
from jax_ccm.errors import RunError, UserError
from jax_ccm.train import Options

ROOT = Path(__file__).parents[2]
# Of the classes of a config, what hands its fields on.
HANDED = ("fixed_texts", "draws_spans", "writes_messages", "cuts_longer")
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def test_values_and_defaults(tmp_path):
    path = write(tmp_path, "optimizer: {learning_rate: 3e-4, clip_norm: 1}\nadapter: {targets: [q_proj, v_proj]}\n")
    loaded = load_config(path)
    assert loaded.optimizer.learning_rate == 3e-4
    assert isinstance(loaded.optimizer.clip_norm, float)
    assert loaded.adapter.targets == ("q_proj", "v_proj")
    assert loaded.train == Config().train


def test_overrides(tmp_path):
    path = write(tmp_path, "optimizer: {learning_rate: 3e-4}\n")
    loaded = load_config(path, ["--optimizer.learning_rate", "1e-3", "--data.train", "a.jsonl", "b.jsonl"])
    assert loaded.optimizer.learning_rate == 1e-3
    assert loaded.data.train == ("a.jsonl", "b.jsonl")


@pytest.mark.parametrize(
    "text", ["data: {tokens: 256, eos: null}", "data: {format: online, tokens: 256, max_chunks: 6}"]
)
def test_another_format_on_the_command_line(tmp_path, capsys, text):
    """Its options are then known, and what the config says for all formats stays."""
    path = write(tmp_path, text)
    argv = ["--data.format", "text", "--data.chunk", "40", "--data.max_chunks", "5"]
    wanted = TextConfig(tokens=256, chunk=40, max_chunks=5)
    assert load_config(path, argv).data == wanted
    assert load_config(path, ["--data.format=text", *argv[2:]]).data == wanted
    assert cli.parse(Options, [str(path), "--workdir", "o", *argv], command="jax_ccm.train")[1].data == wanted
    with pytest.raises(UserError, match="data.min_turns is set, but format 'text' does not read it"):
        load_config(write(tmp_path, "data: {min_turns: 4}"), argv)
    # What other formats read can be unset, for a config that sets it and for one that does not.
    dialogue = write(tmp_path, "data: {min_turns: 4, max_turns: 9, max_chunks: 5}")
    unset = ["--data.format", "online", "--data.min_turns", "None", "--data.max_turns=None"]
    assert load_config(dialogue, unset).data == OnlineConfig(max_chunks=5)
    assert cli.parse(Options, [str(dialogue), "--workdir", "o", *unset], command="jax_ccm.train")[1].data == (
        OnlineConfig(max_chunks=5)
    )
    assert load_config(dialogue, ["--data.chunk", "None"]).data.min_turns == 4
    with pytest.raises(SystemExit):
        load_config(path, ["--data.shots", "2"])
    assert "--data.shots" in capsys.readouterr().err


def test_a_config_that_lists_the_options_of_all_formats(tmp_path):
    """As earlier versions wrote them: nothing, where they were not set."""
    old = "data: {format: online, chunk: null, min_turns: null, truncate: null, eos: null, answer: ' A:'}"
    assert load_config(write(tmp_path, old)).data == OnlineConfig(answer=" A:")
    with pytest.raises(UserError, match="data.chunk is set, but format 'online' does not read it"):
        load_config(write(tmp_path, "data: {format: online, chunk: 4}"))
    with pytest.raises(UserError, match="data.tokens is None"):
        load_config(write(tmp_path, "data: {tokens: null}"))


def test_saved_config_reads_back_equal(tmp_path):
    given = load_config(write(tmp_path, "method: {name: ccm_ema, decay: 0.25, sink: false}\neval: {steps: [1, 2]}\n"))
    save_config(given, tmp_path / "copy.yaml")
    assert load_config(tmp_path / "copy.yaml") == given


def test_files_are_yaml_1_2(tmp_path):
    """Only true and false are booleans, a colon makes no number, and what was text when it was saved is text."""
    loaded = load_config(write(tmp_path, "data: {train: [no, on, 1:30]}\ntrain: {seed: 010, wandb: yes}"))
    assert loaded.data.train == ("no", "on", "1:30") and (loaded.train.seed, loaded.train.wandb) == (10, "yes")
    texts = ("1e5", "3e-4", "0o17", "0x1f", "010", "1_000", "yes", "True", "~", "null", "=", "<<", "2020-01-01", ".inf")
    names = (*texts, "", " a", "a: b", "- x", "#x", "two\nlines", "tab\t", "é — 😀", "\udcff", "long " * 60, "x" * 200)
    given = dataclasses.replace(loaded, data=dataclasses.replace(loaded.data, train=names))
    save_config(given, tmp_path / "copy.yaml")
    assert load_config(tmp_path / "copy.yaml") == given


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer: {lerning_rate: 1}", r"unknown config key 'optimizer.lerning_rate'; did you mean 'optimizer.learn"),
        ("optimiser: {}", "unknown config key 'optimiser'; did you mean 'optimizer'"),
        ("train: {steps: 1.5}", "train.steps is 1.5 .*whole number"),
        ("train: {steps: true}", "train.steps is True .*whole number"),
        ("train: {steps: null}", "train.steps is None .*whole number"),
        ("train: {steps: 0}", "train.steps is 0; it must be at least 1"),
        ("train: {remat: true}", "train.remat is True .*none, dots, all"),
        ("train: {wandb: 1}", "train.wandb is 1 .*text"),
        ("train: 3", "train is 3 .*mapping"),
        ("model: {precision: float16}", "model.precision is 'float16'; allowed: auto, float32, bfloat16, mixed"),
        ("model: {precision: mixed, dtype: float32}", "both are given"),
        ("adapter: {targets: q_proj}", "adapter.targets is 'q_proj' .*list"),
        ("adapter: {targets: [q_proj, lm_head]}", r"adapter.targets\[1\] is 'lm_head' .*q_proj, k_proj"),
        ("optimizer: {learning_rate: fast}", "optimizer.learning_rate is 'fast' .*a number"),
        ("optimizer: {learning_rate: .nan}", "optimizer.learning_rate is nan"),
        ("data: {train: x.jsonl}", "data.train is 'x.jsonl' .*list"),
        ("data: {jion: 0.1}", "unknown config key 'data.jion'; did you mean 'data.join'"),
        ("train: {seed: 1}\ntrain: {seed: 2}", "line 2: the key 'train' stands twice"),
        ("a: {b: 1, 'b' : 2}", "line 1: the key \"'b'\" stands twice; keep one"),
        ("train: {seed: [}", "not valid YAML"),
        ("train: &a {seed: *a}", "train.seed is .*whole number"),
        ("train: !!python/object:os.system {}", "not valid YAML"),
        ("train: {seed: 1}\n---\n{}", "not valid YAML"),
        ("[" * 5000, "nested too deep"),
        ("train: {seed: " + "9" * 5000 + "}", "holds something that no config can"),
        ("train: {wandb: 2020-13-45}", "holds something that no config can"),
        ("train: {wandb: !!bool maybe}", "holds something that no config can"),
        ("data: {bos: yes}", r"data.bos is 'yes' \(str\); it must be true or false"),
        ("{[1]: 2}", r"unknown config key '\(1,\)'"),
        ("- a\n- b", "holds a list"),
        ("train: {trainable: all}\nmodel: {precision: mixed}", "train.trainable is 'all' with model.precision 'mixed'"),
        ("adapter: {merge: some/folder}", "adapter.merge needs a pretrained base"),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        load_config(write(tmp_path, text))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.steps", 0, "train.steps is 0; it must be at least 1"),
        ("train.grace", -0.5, "train.grace is -0.5; it must be at least 0"),
        ("optimizer.clip_norm", float("nan"), "optimizer.clip_norm is nan; it must be at least 0"),
        ("optimizer.learning_rate", 0.0, "optimizer.learning_rate is 0.0; it must be above 0"),
        ("optimizer.warmup_ratio", 1.0, "optimizer.warmup_ratio is 1.0; it must lie in [0, 1)"),
        ("adapter.rank", -1, "adapter.rank is -1; it must be at least 0"),
        ("adapter.dropout", 1.0, "adapter.dropout is 1.0; it must lie in [0, 1)"),
        ("eval.batch_size", 0, "eval.batch_size is 0; it must be at least 1"),
        ("eval.steps", [2, 2], "eval.steps is [2, 2]; give different numbers from 1, such as [1, 2, 4]"),
        ("cache.raw_capacity", 0, "cache.raw_capacity is 0; it must be at least 1"),
        ("data.tokens", 0, "data.tokens is 0; it must be at least 1"),
        ("objective.distillation", 2.0, "objective.distillation is 2.0; it must be between 0 and 1"),
        ("model.precision", "float16", "model.precision is 'float16'; allowed: auto, float32, bfloat16, mixed, or "),
        ("model.scratch.kv_heads", 3, "model.scratch: 4 query heads cannot share 3 key/value heads; the first must "),
        ("model.scratch.layers", 0, "model.scratch: layers, hidden, intermediate, heads and kv_heads must be at least"),
        ("model.scratch.heads", 3, "model.scratch: hidden=64 does not split into heads=3 of an even size"),
    ],
)
def test_a_section_refuses_values_wherever_they_come_from(tmp_path, capsys, key, value, message):
    """In Python, in a file, and on the command line of a command: the same words, and no frame of tyro's around."""
    *section, name = key.split(".")
    given, tree = Config(), {name: value}
    for part in section:
        given = getattr(given, part)
    for part in reversed(section):
        tree = {part: tree}
    path = write(tmp_path, "")
    argv = [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    for make in (
        lambda: dataclasses.replace(given, **{name: value}),
        lambda: from_mapping(tree),
        lambda: load_config(path, argv),
        lambda: cli.parse(Options, [str(path), "--workdir", "o", *argv], command="jax_ccm.train"),
    ):
        with pytest.raises(UserError) as refused:
            make()
        assert str(refused.value).startswith(message)
    assert capsys.readouterr() == ("", "")


def test_what_another_key_mends_is_refused_at_the_end(tmp_path):
    """The base may be named on the command line alone, as may the format of the data."""
    path = write(tmp_path, "model: {revision: v1}\neval: {by: stream}\n")
    with pytest.raises(UserError, match="eval.by 'stream' reads plain text: it needs data.format 'text'"):
        load_config(path)
    with pytest.raises(UserError, match="eval.by 'continuation' goes on with plain text: data.format is 'dialogue'"):
        load_config(path, ["--eval.by", "continuation", "--eval.reply_tokens", "8"])
    with pytest.raises(UserError, match="model.revision is 'v1', and model.source ''"):
        load_config(path, ["--data.format", "text"])
    found = load_config(path, ["--data.format", "text", "--model.source", "org/model"])
    assert (found.model.source, found.model.revision) == ("org/model", "v1")
    with pytest.raises(UserError, match="it needs data.format 'text' without data.ratio"):
        load_config(path, ["--data.format", "text", "--data.ratio", "0.5"])


def test_missing_file():
    with pytest.raises(UserError, match="there is no config file nowhere.yaml"):
        load_config("nowhere.yaml")


def test_command_line(tmp_path):
    path = write(tmp_path, "train: {steps: 7}\n")
    argv = ["--train.seed", "3", str(path), "--workdir", "out", "--method.sink", "True"]
    options, loaded = cli.parse(Options, argv, command="jax_ccm.train")
    assert options.workdir == Path("out")
    assert (loaded.train.steps, loaded.train.seed, loaded.method.sink) == (7, 3, True)


@pytest.mark.parametrize(
    "argv",
    [[], ["--workdir", "out"], ["{path}"], ["{path}", "--workdir", "out", "--train.step", "3"],
     ["{path}", "--workdir", "out", "--train.steps", "many"]],
)  # fmt: skip
def test_bad_arguments_exit_with_2(tmp_path, capsys, argv):
    path = write(tmp_path, "train: {steps: 7}\n")
    with pytest.raises(SystemExit) as stop:
        cli.parse(Options, [arg.format(path=path) for arg in argv], command="jax_ccm.train")
    assert stop.value.code == 2
    assert capsys.readouterr().err


@pytest.mark.parametrize(("error", "code"), [(UserError("bad key"), 2), (RunError("no luck"), 1), (None, 0)])
def test_exit_codes(capsys, error, code):
    def main():
        if error is not None:
            raise error

    with pytest.raises(SystemExit) as stop:
        cli.run(main)
    assert stop.value.code == code
    assert error is None or str(error) in capsys.readouterr().err


def test_help_touches_no_device():
    program = (
        "import sys, jax\n"
        "jax.devices = jax.local_devices = lambda *a: (_ for _ in ()).throw(AssertionError('device'))\n"
        "from jax_ccm.config import cli; from jax_ccm import train\n"
        "sys.argv = ['train', '--help']\n"
        "try: train.main()\n"
        "except SystemExit as e: assert e.code == 0\n"
        "heavy = {'orbax', 'grain', 'transformers', 'tensorboardX', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "--optimizer.learning_rate" in done.stdout


def test_a_mistake_in_a_command_shows_no_traceback(tmp_path):
    path = write(tmp_path, "optimizer: {lerning_rate: 1}\n")
    command = [sys.executable, "-m", "jax_ccm.train", str(path), "--workdir", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert "did you mean 'optimizer.learning_rate'" in done.stderr and "Traceback" not in done.stderr


def fields(config, path=()):
    for field in dataclasses.fields(config):
        here = (*path, field.name)
        yield here
        if dataclasses.is_dataclass(value := getattr(config, field.name)):
            yield from fields(value, here)


def test_every_field_is_read_somewhere():
    """A field that nobody reads is a promise that nobody keeps: each stands in the package as an attribute."""
    read = set()
    for path in sorted((ROOT / "jax_ccm").rglob("*.py")):
        tree = ast.parse(path.read_text())
        nodes = list(ast.walk(tree))
        if path.name in (
            "config.py",
            "schema.py",
            "sections.py",
        ):  # to check a value is not to read it; to hand it on is
            handed = [node for node in nodes if isinstance(node, ast.FunctionDef) and node.name in HANDED]
            nodes = [node for function in handed for node in ast.walk(function)]
        read |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    # Options of a method are passed on by name.
    method = {f.name for f in dataclasses.fields(schema.MethodConfig)}
    # The mesh is made of all its axes, by name.
    read.update(sharding.AXES)
    idle = [
        ".".join(path)
        for config in (Config(data=kind()) for kind in BY_FORMAT.values())
        for path in fields(config)
        if path[-1] not in read and path[-1] not in method
    ]
    assert not idle


def test_configs_exist():
    names = {path.stem for path in CONFIGS}
    assert "recall_tiny" in names
    for data in ("dialog", "icl", "unified"):
        assert {f"stage1_{data}_llama2_7b", f"ccm_concat_{data}_llama2_7b", f"ccm_merge_{data}_llama2_7b"} <= names


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_config(path):
    """Each loads, builds its method, and says in its header what it is."""
    from jax_ccm.config.loading import build_method
    from jax_ccm.nn import AdapterConfig

    loaded = load_config(path)
    method = build_method(loaded)
    AdapterConfig(
        loaded.adapter.rank, loaded.adapter.alpha, targets=loaded.adapter.targets, tokens=method.num_embeddings
    )
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    for word in ("Paper:", "Command:", "Expected:", "Hardware:"):
        assert word in header, f"{path.name} says nothing of {word}"


def test_old_names_are_read_and_said(tmp_path, capsys):
    config = load_config(write(tmp_path, "model: {dtype: bfloat16}\nmethod: {name: ccm_concat, fewest: 1}"))
    assert config.model.precision == "bfloat16" and config.method.options() == {"min_comp_tokens": 1}
    said = capsys.readouterr().err
    assert "model.dtype: bfloat16 of an earlier version is read as model.precision" in said
    assert "method.fewest: 1 of an earlier version is read as method.min_comp_tokens" in said
    assert load_config(write(tmp_path, "method: {fewest: null}")).method.options() == {}
    assert not capsys.readouterr().err, "nothing changed"

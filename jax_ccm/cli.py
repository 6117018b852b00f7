"""What the commands share: ``python -m jax_ccm.X CONFIG.yaml --option VALUE --section.key VALUE``."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, NoReturn, TypeVar

from jax_ccm import processes
from jax_ccm.config import Config, check, from_mapping
from jax_ccm.errors import RunError, UserError
from jax_ccm.mappings import read_yaml

T = TypeVar("T")


def parse(options: type[T], argv: Sequence[str] | None = None, *, command: str) -> tuple[T, Config, Path]:
    """Parses a command line: the config file, the command's own options, and overrides of config keys.

    ``--help`` shows the values of the config file where one is given, and the defaults otherwise.

    Args:
      options: a dataclass with the command's own options; its docstring is the help text.
      argv: arguments; None for those of the process.
      command: the name after ``python -m``.

    Returns:
      The options, the config, and the path of the config file.

    Raises:
      UserError: for a bad config.
      SystemExit: with 0 after ``--help``, with 2 for a bad argument.
    """
    import tyro

    argv = list(sys.argv[1:] if argv is None else argv)
    file = next((arg for arg in argv if arg.endswith((".yaml", ".yml"))), None)
    config = Config() if file is None else from_mapping(read_yaml(file))
    fields = [
        ("config", Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG.yaml", help="The experiment.")]),
        ("options", Annotated[options, tyro.conf.arg(name="", help="")]),
        ("settings", Annotated[Config, tyro.conf.arg(name="", help="")], dataclasses.field(default=config)),
    ]
    arguments = dataclasses.make_dataclass("Arguments", fields)
    parsed = tyro.cli(
        arguments,
        args=argv,
        prog=f"python -m {command}",
        description=options.__doc__,
        use_underscores=True,
        config=(tyro.conf.FlagConversionOff,),
    )
    if file is None or parsed.config != Path(file):
        raise UserError(f"the config is {str(parsed.config)!r}; give a YAML file, such as configs/recall_tiny.yaml")
    check(parsed.settings)
    return parsed.options, parsed.settings, parsed.config


def keep_programs() -> None:
    """Has JAX keep compiled programs on disk, so that the next command that needs the same ones starts faster.

    They go to ``jax_ccm/programs`` in the user's cache folder (``XDG_CACHE_HOME``, else ``~/.cache``), each kind of
    processor to a folder of its own: code for one may not run on another. ``JAX_COMPILATION_CACHE_DIR`` names another
    folder, or, if empty, none.
    """
    import jax

    if "JAX_COMPILATION_CACHE_DIR" in os.environ or jax.config.jax_compilation_cache_dir:
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = home / "jax_ccm" / "programs" / _processor()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        print(f"note: compiled programs are not kept, {folder} cannot be used ({e})", file=sys.stderr)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))


def _processor() -> str:
    """Names the kind of processor: its architecture, and a digest of what it is able to do."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        # "flags" on x86, "Features" on ARM.
        able = next(line for line in lines if line.lower().startswith(("flags", "features")))
    except (OSError, StopIteration):
        able = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(able.encode()).hexdigest()[:12]}"


def run(main: Callable[[], int | None], *, several: bool = False) -> NoReturn:
    """Runs a command and exits: 0 on success, 2 for a user's mistake, 1 for a run that failed.

    Mistakes and failures are one plain message on stderr; only a bug shows a traceback.

    Args:
      main: the command.
      several: it can be run by several processes together; otherwise it refuses to be one of them.
    """
    keep_programs()
    try:
        if not several and not {"-h", "--help"} & set(sys.argv[1:]):
            processes.refuse_several()
        code = main() or 0
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        code = 2
    except RunError as e:
        print(f"failed: {e}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    processes.leave(code)
    sys.exit(code)

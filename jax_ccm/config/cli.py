"""What the commands share: ``python -m jax_ccm.X CONFIG --option VALUE --section.key VALUE``."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import importlib.metadata
import importlib.util
import os
import pkgutil
import platform
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, NoReturn, TypeVar

from jax_ccm.config import arguments
from jax_ccm.config.adapters import open_config
from jax_ccm.config.schema import Config, check, in_format
from jax_ccm.distributed import processes
from jax_ccm.errors import RunError, UserError
from jax_ccm.numerics.precision import processor_flags
from jax_ccm.records import paths

T = TypeVar("T")


def parse(options: type[T], argv: Sequence[str] | None = None, *, command: str) -> tuple[T, Config]:
    """Parses a command line: the config, the command's own options, and overrides of config keys.

    The config is a YAML file, or an adapter, named first, whose own config holds (`adapters.open_config`). ``--help``
    shows the values of the config where one is given, and the defaults otherwise.

    Args:
      options: a dataclass with the command's own options; its docstring is the help text.
      argv: arguments; None for those of the process.
      command: the name after ``python -m``.

    Returns:
      The options and the config.

    Raises:
      UserError: for a bad config, or a value that it cannot have.
      SystemExit: with 0 after ``--help``, with 2 for a bad argument.
    """
    import tyro

    argv = list(sys.argv[1:] if argv is None else argv)
    first = argv[0] if argv and not argv[0].startswith("-") else None
    # A YAML file may stand behind options, anything else only in front of them.
    file = next((arg for arg in argv if arg.endswith((".yaml", ".yml"))), first)
    config, argv = in_format(Config() if file is None else open_config(file), argv)
    about = tyro.conf.arg(metavar="CONFIG", help="A YAML file; or an adapter's name, folder or hub id: its own config.")
    fields = [
        ("config", Annotated[paths.Folder, tyro.conf.Positional, about]),
        ("options", Annotated[options, tyro.conf.arg(name="", help="")]),
        ("settings", Annotated[Config, tyro.conf.arg(name="", help="")], dataclasses.field(default=config)),
    ]
    parsed = arguments.parse(
        dataclasses.make_dataclass("Arguments", fields),
        argv,
        prog=f"python -m {command}",
        description=options.__doc__,
        use_underscores=True,
        # Flags take a value: --accept_changes True.
        config=(tyro.conf.FlagConversionOff,),
    )
    # tyro may have taken another argument for the config than the one that was read.
    if file is None or parsed.config != paths.of(file):
        raise UserError(
            f"the config is {str(parsed.config)!r}; give a YAML file, such as configs/recall_tiny.yaml, or an adapter "
            "as the first argument"
        )
    check(parsed.settings)
    return parsed.options, parsed.settings


def keep_programs() -> None:
    """Has JAX keep compiled programs on disk, so that the next command that needs the same ones starts faster.

    They go to ``jax_ccm/programs`` in the user's cache folder (``XDG_CACHE_HOME``, else ``~/.cache``), each kind of
    processor to a folder of its own: code for one may not run on another. ``JAX_COMPILATION_CACHE_DIR`` names another
    folder, or, if empty, none.
    """
    import jax

    set_already = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or set_already:
        return
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "jax_ccm", "programs", _processor())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Making a folder that is there succeeds even where nothing can be written.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        print(f"note: compiled programs are not kept, {folder} cannot be used ({e})", file=sys.stderr)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))


def _processor() -> str:
    """Names the kind of processor: its architecture, and a digest of what it is able to do."""
    able = " ".join(sorted(processor_flags())) or platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(able.encode()).hexdigest()[:12]}"


def find_home() -> None:
    """Takes a temporary folder for the home of a user that has none.

    A container often runs under a number without a name, and without ``HOME``; JAX, transformers, matplotlib and others
    keep their files there, and ask in ways that raise or make a folder named ``~``.
    """
    try:
        Path.home()
    except RuntimeError:
        folder = Path(tempfile.gettempdir(), f"home-{os.getuid()}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        if folder.is_symlink() or not folder.is_dir() or folder.stat().st_uid != os.getuid():
            # Somebody else put it there, and could put programs into it.
            folder = Path(tempfile.mkdtemp(prefix="home-"))
        os.environ["HOME"] = str(folder)
        print(
            f"note: HOME is not set and user {os.getuid()} has no name; {folder} serves as the home folder",
            file=sys.stderr,
        )


# Platforms of JAX that need a package of their own.
PLUGINS = {"cuda": "xla_cuda", "gpu": ("xla_cuda", "xla_rocm"), "rocm": "xla_rocm", "tpu": "libtpu"}
OF_JAX = ("xla_cuda", "xla_rocm", "libtpu")
INSTALL = {
    "cuda": "'jax[cuda13]' or 'jax[cuda12]'", "gpu": "'jax[cuda13]' or 'jax[rocm]'", "rocm": "'jax[rocm]'",
    "tpu": "'jax[tpu]'",
}  # fmt: skip


def check_platforms() -> None:
    """Refuses platforms in ``JAX_PLATFORMS`` for which nothing is installed. No device is touched.

    Raises:
      UserError: naming the package that is missing, or the platforms that there are.
    """
    given = os.environ.get("JAX_PLATFORMS", "")
    # JAX finds plugins in both ways: as modules in the package jax_plugins, and by entry points.
    entries = importlib.metadata.entry_points(group="jax_plugins")
    plugins = {*_modules("jax_plugins"), *(entry.name for entry in entries)}
    if importlib.util.find_spec("libtpu") is not None:
        plugins.add("libtpu")
    for name in filter(None, given.split(",")):
        if name in ("cpu", *plugins):
            continue
        if name not in PLUGINS and any(not plugin.startswith(OF_JAX) for plugin in plugins):
            continue  # of another maker, whose plugin may be called otherwise; JAX says what it knows
        if name not in PLUGINS:
            raise UserError(f"JAX_PLATFORMS is {given!r}; {name!r} is no platform. Allowed: cpu, {', '.join(PLUGINS)}")
        if not any(plugin.startswith(PLUGINS[name]) for plugin in plugins):
            raise UserError(
                f"JAX_PLATFORMS is {given!r}, but JAX's plugin for {name} is not installed here; pip install "
                f"{INSTALL[name]}, or set JAX_PLATFORMS=cpu"
            )


def _modules(package: str) -> set[str]:
    """Names of the modules in a package, without importing any; empty if there is no such package."""
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations if spec else None) or []
    return {module.name for module in pkgutil.iter_modules(folders)}


# What a file or folder of the user's, or the disk below it, may have against being written.
UNUSABLE = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
    errno.ENAMETOOLONG, errno.ELOOP, errno.EFBIG, errno.EIO,
}  # fmt: skip


def run(main: Callable[[], int | None], *, several: bool = False) -> NoReturn:
    """Runs a command and exits: 0 on success, 2 for a user's mistake, 1 for a run that failed.

    Mistakes and failures are one plain message on stderr; only a bug shows a traceback. Whoever reads the output may
    leave early (``| head``): the command ends in silence, with the code of a process that SIGPIPE ended.

    Args:
      main: the command.
      several: it can be run by several processes together; otherwise it refuses to be one of them.
    """
    _open_closed()
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="backslashreplace")  # a terminal may lack characters of an answer, or of a path
    try:
        # First: what follows asks for the home folder.
        find_home()
        check_platforms()
        keep_programs()
        if not several and not {"-h", "--help"} & set(sys.argv[1:]):
            processes.refuse_several()
        code = main() or 0
        sys.stdout.flush()
    except UserError as e:
        code = _said(f"error: {e}", 2)
    except RunError as e:
        code = _said(f"failed: {e}", 1)
    except KeyboardInterrupt:
        code = _said("interrupted", 130)
    except BrokenPipeError:
        code = 128 + signal.SIGPIPE
    except OSError as e:
        if e.errno not in UNUSABLE:
            raise
        code = _said(
            f"failed: {e.filename or 'the output'} cannot be used ({e.strerror}); mend that, or name another", 1
        )
    except RuntimeError as e:
        if "Unable to initialize backend" not in str(e):
            raise
        code = _said(
            f"error: JAX finds no device that it can use ({str(e).splitlines()[0]}). JAX_PLATFORMS is "
            f"{os.environ.get('JAX_PLATFORMS', '')!r}; JAX_PLATFORMS=cpu takes the processor",
            2,
        )
    try:
        sys.stdout.flush()
    except OSError:
        # The interpreter flushes once more at its end, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    processes.leave(code)
    sys.exit(code)


def _open_closed() -> None:
    """Opens the standard streams that the parent closed (``>&-``): else the next file would get their number."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            handle = os.open(os.devnull, os.O_RDWR)
            if handle != number:
                os.dup2(handle, number)
                os.close(handle)
            setattr(sys, name, open(number, mode, closefd=False))


def _said(text: str, code: int) -> int:
    """Prints an error, and gives the code back."""
    with contextlib.suppress(OSError, ValueError):  # stderr may be closed, too
        print(text, file=sys.stderr)
    return code

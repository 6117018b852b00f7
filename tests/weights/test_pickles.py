"""Torch files are read as data: every kind of tensor, and nothing that could act."""

import os
import pickle
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jax_ccm.errors import UserError
from jax_ccm.weights.pickles import read_torch

FILES = Path(__file__).parents[1] / "golden" / "torch_files"
RAMP = np.arange(24, dtype=np.float32)


def archive(path: Path, data: bytes, entries: dict[str, bytes] | None = None, compression=zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", data)
        file.writestr("archive/version", "3\n")
        for name, content in (entries or {}).items():
            file.writestr(f"archive/{name}", content)
    return path


def tensor_pickle(storage="FloatStorage", key="0", count=4, offset=0, size=(2, 2), stride=(2, 1)) -> bytes:
    """The pickle of ``{"x": tensor}`` as torch writes it, without torch."""
    protocol_0 = lambda value: pickle.dumps(value, protocol=0)[:-1]
    pid = (
        b"(" + protocol_0("storage") + f"ctorch\n{storage}\n".encode() + b"".join(map(protocol_0, (key, "cpu", count)))
    )
    rest = protocol_0(offset) + protocol_0(size) + protocol_0(stride)
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + pid + b"tQ" + rest + b"I00\nccollections\nOrderedDict\n)RtR"
    return b"}" + protocol_0("x") + tensor + b"s."


def test_every_kind_of_tensor():
    found = read_torch(FILES / "kinds.bin")
    sevenths = RAMP.reshape(4, 6) / np.float32(7)
    expected = {
        "float32": sevenths,
        "bfloat16": sevenths.astype(ml_dtypes.bfloat16),
        "float16": sevenths.astype(np.float16),
        "int64": np.arange(24).reshape(2, 12) - 5,
        "bool": RAMP > 11,
        "transposed": sevenths.T,
        "view": RAMP[6:18].reshape(3, 4),
        "shared": RAMP,
        "strided": RAMP[1::3],
        "scalar": np.float32(2.5),
        "empty": np.zeros((0, 3), np.float32),
    }
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    found["shared"][:] = 0
    assert found["view"].any(), "arrays of one storage must be copies of their own"


def test_state_dict_with_metadata():
    np.testing.assert_array_equal(read_torch(FILES / "module.bin")["linear.weight"], RAMP[:6].reshape(2, 3))


def test_hand_made_file_is_like_torchs(tmp_path):
    path = archive(tmp_path / "x.bin", tensor_pickle(), {"data/0": RAMP[:4].tobytes(), "byteorder": b"little"})
    np.testing.assert_array_equal(read_torch(path)["x"], RAMP[:4].reshape(2, 2))


class Command:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "payload, named",
    [
        (lambda proof: Command(os.system, f"touch {proof}"), "system"),
        (lambda proof: Command(eval, f"open({str(proof)!r}, 'w').close()"), "eval"),
        (lambda proof: {"x": [Command(exec, f"open({str(proof)!r}, 'w').close()")]}, "exec"),
        (lambda proof: Command(getattr, proof, "touch"), "getattr"),
    ],
)
def test_nothing_is_executed(tmp_path, payload, named, protocol):
    proof = tmp_path / "proof"
    data = pickle.dumps(payload(proof), protocol=protocol)
    path = archive(tmp_path / "evil.bin", data)
    with pytest.raises(UserError, match=rf"asks for \w+\.({named}|Path|_reconstructor|PosixPath)"):
        read_torch(path)
    assert not proof.exists()
    # The payload is live: Python's own loader would have run it.
    if named != "getattr":
        pickle.loads(data)
        assert proof.exists()


@pytest.mark.parametrize(
    "opcodes",
    [
        b"ctorch._utils\n_rebuild_tensor_v2\n}(S'__globals__'\nI1\nub.",  # set the state of the stand-in itself
        b"ctorch\nFloatStorage\n}S'x'\nI1\nsb.",
        b"ctorch\n_utils._rebuild_tensor_v2\n.",
        b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93.",
        b"\x82\x01.",  # an extension code
        b"cjax_ccm.weights.pickles\nread_torch\n.",
        b"(iposix\nsystem\n.",
    ],
)
def test_other_ways_in_are_closed(tmp_path, opcodes):
    with pytest.raises(UserError):
        read_torch(archive(tmp_path / "evil.bin", opcodes))


def test_a_parameter_is_named():
    with pytest.raises(UserError, match=r"torch\._utils\._rebuild_parameter"):
        read_torch(FILES / "parameter.bin")


def test_legacy_format_is_refused_with_its_reason():
    with pytest.raises(UserError, match=r"before 1\.6"):
        read_torch(FILES / "legacy.bin")


def test_truncated_anywhere(tmp_path):
    whole = (FILES / "kinds.bin").read_bytes()
    path = tmp_path / "cut.bin"
    for size in range(0, len(whole), 37):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="cut short|not a file of torch"):
            read_torch(path)


def test_flipped_bytes_never_pass_unnoticed(tmp_path):
    whole = bytearray((FILES / "module.bin").read_bytes())
    path, good = tmp_path / "flipped.bin", read_torch(FILES / "module.bin")["linear.weight"]
    for place in range(0, len(whole), 5):
        changed = bytearray(whole)
        changed[place] ^= 0xFF
        path.write_bytes(changed)
        try:
            found = read_torch(path)
        except UserError:
            continue
        np.testing.assert_array_equal(found["linear.weight"], good)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(size=(2, 3), stride=(3, 1)), "beyond its storage"),
        (dict(offset=1), "beyond its storage"),
        (dict(offset=-1), "no tensor"),
        (dict(size=(10**9, 10**9), stride=(0, 0)), "beyond its storage"),
        (dict(size=(2,)), "no tensor"),
        (dict(stride=(-2, 1)), "no tensor"),
        (dict(count=5), "has 16 bytes, but 5 numbers"),
        (dict(key="7"), "lacks the entry"),
        (dict(key="../../secret"), "lacks the entry"),
        (dict(storage="ComplexFloatStorage"), "torch.ComplexFloatStorage"),
    ],
)
def test_impossible_tensors(tmp_path, changes, message):
    path = archive(tmp_path / "x.bin", tensor_pickle(**changes), {"data/0": RAMP[:4].tobytes()})
    with pytest.raises(UserError, match=message):
        read_torch(path)


@pytest.mark.parametrize(
    "data, message",
    [
        (pickle.dumps([1]), "holds a list"),
        (pickle.dumps({"x": 1}), "'x' is not a tensor"),
        (pickle.dumps({"x": (None, 1, 2, 3, 4)}), "'x' is not a tensor"),
        (b"", "damaged"),
    ],
)
def test_other_contents(tmp_path, data, message):
    with pytest.raises(UserError, match=message):
        read_torch(archive(tmp_path / "x.bin", data))


def test_unusual_archives(tmp_path):
    entries = {"data/0": RAMP[:4].tobytes()}
    with pytest.raises(UserError, match="big-endian"):
        read_torch(archive(tmp_path / "x.bin", tensor_pickle(), entries | {"byteorder": b"big"}))
    with pytest.raises(UserError, match="compressed"):
        read_torch(archive(tmp_path / "x.bin", tensor_pickle(), entries, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(tmp_path / "y.bin", "w") as file:
        file.writestr("readme", "no tensors here")
    with pytest.raises(UserError, match="not one of torch.save"):
        read_torch(tmp_path / "y.bin")
    with pytest.raises(UserError, match="there is no file"):
        read_torch(tmp_path / "none.bin")
    (tmp_path / "text.bin").write_text("hello")
    with pytest.raises(UserError, match="not a file of torch.save"):
        read_torch(tmp_path / "text.bin")

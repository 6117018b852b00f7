"""Writes the files beside it with PyTorch, which the library and its tests do without.

python record.py        # needs torch and numpy; recorded with torch 2.13
"""

from collections import OrderedDict
from pathlib import Path

import torch

HERE = Path(__file__).parent


def tensors() -> dict[str, torch.Tensor]:
    """One of each kind that matters; the test knows the same values by their names."""
    ramp = torch.arange(24, dtype=torch.float32)
    base = ramp.clone()
    return {
        "float32": ramp.reshape(4, 6) / 7,
        "bfloat16": (ramp.reshape(4, 6) / 7).bfloat16(),
        "float16": (ramp.reshape(4, 6) / 7).half(),
        "int64": torch.arange(24).reshape(2, 12) - 5,
        "bool": ramp > 11,
        "transposed": (ramp.reshape(4, 6) / 7).T,
        "view": base[6:18].reshape(3, 4),
        "shared": base,
        "strided": base[1::3],
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
    }


class Module(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 2, bias=False)
        self.linear.weight.data = torch.arange(6, dtype=torch.float32).reshape(2, 3)


torch.save(OrderedDict(tensors()), HERE / "kinds.bin")
# A module's state dict carries an attribute `_metadata`.
torch.save(Module().state_dict(), HERE / "module.bin")
torch.save(tensors(), HERE / "legacy.bin", _use_new_zipfile_serialization=False)
torch.save({"weight": torch.nn.Parameter(torch.ones(2))}, HERE / "parameter.bin")

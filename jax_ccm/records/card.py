"""What a person says of an adapter."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class CardConfig:
    """What the model card of the adapter says and no run can know."""

    base_model: str = ""
    """Id of the base on the hub; empty for `model.source` where that is one."""
    license: str = ""
    """Of the adapter, as the hub spells it, such as "apache-2.0"."""
    description: str = ""
    """What the adapter is for, in a few sentences."""
    datasets: tuple[str, ...] = ()
    """Ids of the training data on the hub."""
    data: str = ""
    """Where the training data come from, and their licences."""
    limits: str = ""
    """What the adapter cannot do, or should not be used for."""

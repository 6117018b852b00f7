"""What a training step minimises, as data."""

from __future__ import annotations

import dataclasses

from jax_ccm.errors import UserError
from jax_ccm.rules.types import Method

# The largest value of each setting, or None.
_MOST = {"distillation": 1, "dependence": None, "dependence_floor": None, "alignment": None}
_ASKING = "objective.distillation, objective.dependence and objective.alignment"


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is minimised. At its defaults the cross-entropy of each scored token, all alike (CCM, equation 4).

    The other choices ask a teacher: the base without its adapter, over the text of the same rows, in the same step.
    Each of its two forms, with all earlier text in sight or only that of the token's own segment, is one forward pass
    more.
    """

    distillation: float = 0.0
    """Share of the loss that is the distance from the teacher with full context, the KL divergence of the predicted
    tokens, forward and over the whole vocabulary; the rest is cross-entropy. From 0 to 1."""
    dependence: float = 0.0
    """Weigh each scored token by what context is worth there to the teacher: the log-likelihood with full context less
    that with its own segment alone, in nats, cut to between 0 and this. 0: all tokens weigh the same."""
    dependence_floor: float = 0.0
    """Added to each of these weights, so that tokens for which context is worth nothing still count."""
    alignment: float = 0.0
    """Weight, beside the rest of the loss, of how far attention is from what it gives the teacher with full context at
    the scored tokens: the squared distance over the square of the teacher's, averaged over layers and heads."""

    def __post_init__(self):
        for name, most in _MOST.items():
            value = getattr(self, name)
            # Not ``value < 0``: NaN fails this, too.
            if not value >= 0 or (most is not None and value > most):
                allowed = "at least 0" if most is None else f"between 0 and {most}"
                raise UserError(f"objective.{name} is {value}; it must be {allowed}")
        if self.dependence_floor and not self.dependence:
            raise UserError(
                f"objective.dependence_floor is {self.dependence_floor}, and objective.dependence is 0, so that all "
                "tokens weigh the same; set objective.dependence, or leave dependence_floor out"
            )

    @property
    def asks_teacher(self) -> bool:
        """Whether a step runs the base on its own."""
        return bool(self.distillation or self.dependence or self.alignment)

    def require(self, method: Method, *, trains_base: bool) -> None:
        """Refuses what has no teacher.

        Raises:
          UserError: if the base is trained with its pupil, or the rows of the method hold no context to read.
        """
        if self.asks_teacher and trains_base:
            raise UserError(
                f"{_ASKING} ask the frozen base, and train.trainable 'all' trains it; set train.trainable: adapter, or "
                "all three to 0"
            )
        if self.asks_teacher and method.context == "dropped":
            raise UserError(
                f"{_ASKING} compare with full context, and method {method.name!r} is given none; set all three to 0, "
                "or take another method"
            )

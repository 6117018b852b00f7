"""A model of the lm-evaluation-harness (the package ``lm_eval``): importing this registers it there as ``jax_ccm``."""

import importlib.util

from jax_ccm.errors import UserError

if importlib.util.find_spec("lm_eval") is None:
    raise UserError("the lm-evaluation-harness is not installed here; pip install 'jax_ccm[lm-eval]'")

from jax_ccm.harness.model import HarnessModel as HarnessModel  # noqa: E402

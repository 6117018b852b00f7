"""What a memory belongs to."""

from __future__ import annotations

import hashlib
import json

from jax_ccm.sessions.engine import Engine
from jax_ccm.weights.identity import describe_base


def fingerprints(engine: Engine) -> dict[str, str]:
    """Digests of all that the memory of a session goes with: base, adapter, tokenizer and template."""
    from jax_ccm.evals.systems import fingerprint

    experiment, template = engine.experiment, engine.template

    def digest(text):
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    # The template counts as token ids: another spelling that gives the same tokens is the same to a memory.
    fixed = [
        template.start,
        template.separator,
        template.answer,
        *template.heads.values(),
        *template.tails.values(),
    ]
    return {
        "base": describe_base(experiment.model, "")["fingerprint"],
        "adapter": fingerprint(experiment.model),
        "tokenizer": digest(json.dumps(sorted(experiment.tokenizer.get_vocab().items()))),
        "template": digest(json.dumps([piece.tolist() for piece in fixed])),
    }

"""PyTorch's side of the comparison, as its users train: transformers, `sdpa`, PEFT's LoRA, eager and compiled.

For an interpreter that has torch, which need not be the one of jax_ccm (`peer.py` runs it): it imports nothing of the
library.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from typing import Any

# Runs, and gives a function that says what was found, which is called when time has been taken.
Step = Callable[[], Callable[[], dict[str, float]]]


def make(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Step]]:
    """The steps ``"float32, eager"``, ``"bfloat16, compiled"`` and so on.

    Args:
      settings: "model", a folder in Hugging Face's format; "arrays", an NPZ file with ``tokens``, ``labels`` (of each
        place that predicts one, else -100), ``position`` ``[B, T]`` and, beside an adapter, ``mask`` ``bool [B, T, T]``
        and ``comp [n, D]``; "adapter", None or PEFT's ``r``, ``lora_alpha`` and ``target_modules``; "precisions",
        "compiled" and "threads".
    """
    import numpy as np
    import torch
    import transformers

    torch.set_num_threads(settings["threads"])
    arrays = {name: torch.from_numpy(np.asarray(x)) for name, x in np.load(settings["arrays"]).items()}
    about = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    steps = {}
    for precision in settings["precisions"]:
        load = transformers.AutoModelForCausalLM.from_pretrained
        base = load(settings["model"], dtype=getattr(torch, precision), attn_implementation="sdpa")
        base.requires_grad_(False)
        if settings["adapter"] is None:
            model, step = base, _step(base, base, arrays)
        else:
            import peft

            about["peft"] = peft.__version__
            model = peft.get_peft_model(base, peft.LoraConfig(lora_dropout=0.0, **settings["adapter"]))
            step = _step(model, base, arrays)
        steps[f"{precision}, eager"] = step
        if settings["compiled"]:
            steps[f"{precision}, compiled"] = _step(torch.compile(model), base, arrays)
    return about, steps


def _step(model: Any, base: Any, arrays: Mapping[str, Any]) -> Step:
    """Forward and backward: to the adapter and its embeddings, or to the embeddings of all tokens."""
    import torch

    tokens, labels = arrays["tokens"].long(), arrays["labels"].long()
    table = base.get_input_embeddings().weight
    # Compression tokens are numbered behind the vocabulary, which has no rows for them; theirs are put in below.
    embedded = torch.nn.functional.embedding(tokens.clamp(max=len(table) - 1), table).detach()
    given: dict[str, Any] = {}
    if "mask" in arrays:
        comp = arrays["comp"].clone().requires_grad_(True)
        rows, columns = (tokens >= len(table)).nonzero(as_tuple=True)
        number = tokens[rows, columns] - len(table)
        # [B, 1, T, T]: the same for all heads.
        given = {"attention_mask": arrays["mask"][:, None], "position_ids": arrays["position"].long()}
        trained = [comp, *(p for p in model.parameters() if p.requires_grad)]
    else:
        trained = [embedded.requires_grad_(True)]

    def step() -> Callable[[], dict[str, float]]:
        for each in trained:
            # Not zeroed: the backward pass then writes in place of adding.
            each.grad = None
        inputs = embedded
        if given:
            inputs = embedded.index_put((rows, columns), comp[number].to(embedded.dtype))
        # The loss in float32, as ours.
        logits = model(inputs_embeds=inputs, use_cache=False, **given).logits.float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        loss.backward()

        def square():
            return sum(float((each.grad.double() ** 2).sum()) for each in trained if each.grad is not None)

        return lambda: {"loss": float(loss.detach()), "gradient": square() ** 0.5}

    return step

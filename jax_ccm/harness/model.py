"""What the lm-evaluation-harness asks of a model, answered from a memory, or from full or no context."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import simple_parse_args_string

from jax_ccm.config.adapters import open_config
from jax_ccm.config.loading import Experiment, base_source, load_experiment
from jax_ccm.config.schema import check
from jax_ccm.data.chat_template import ChatTemplate
from jax_ccm.distributed import sharding
from jax_ccm.errors import UserError, unknown
from jax_ccm.evals.prompts import (
    SYSTEMS,
    Prompt,
    Settings,
    carried,
    likelihoods,
    rolling,
    with_contexts_of_others,
)
from jax_ccm.evals.replies import continued
from jax_ccm.evals.systems import make_system
from jax_ccm.memory.generation import Sampling
from jax_ccm.rules.examples import Example
from jax_ccm.weights.identity import describe_base

logger = logging.getLogger(__name__)
# What the harness hands to every model beside its own arguments, and what of it is none of ours.
FOREIGN = ("max_batch_size", "device")
DRAWS = ("until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k")


@register_model("jax_ccm")
class HarnessModel(TemplateLM):
    """One system of an experiment, as the harness calls it.

    Attributes:
      system: what answers.
      tokenizer: a fast tokenizer of transformers.
      settings: how.
      cutting: where prompts are cut.
      requests: how many prompts were answered so far.
      tokens, slots: how many tokens of theirs stood in contexts, and in how many slots these were held.
      truncated: how many prompts have lost their oldest tokens.
    """

    def __init__(self, experiment: Experiment, system: str = "memory", settings: Settings = Settings()):
        """Prepares a system.

        Args:
          experiment: model, adapter, method and tokenizer.
          system: one of `SYSTEMS`.
          settings: how requests are answered.

        Raises:
          UserError: for a system or setting that cannot be, or data without a tokenizer.
        """
        super().__init__()
        if system not in SYSTEMS:
            raise unknown("system", system, SYSTEMS)
        if experiment.tokenizer is None:
            raise UserError(
                f"data.format is {experiment.config.data.format!r}, which has no tokenizer; only a model of text can "
                "do the tasks of the harness"
            )
        sharding.check_rows(experiment.mesh, "batch_size", settings.batch_size)
        config = experiment.config
        self.experiment, self.settings, self.name = experiment, settings, system
        self.system = make_system(
            # Wrong memory is the memory; what differs is the context that it reads (`_read`).
            "memory" if system == "wrong" else system, experiment.model, experiment.method,
            base=describe_base(experiment.model, experiment.base_name),
            adapter=None if experiment.loaded is None else config.adapter.load, full_adapter=None,
            source=base_source(config), accept_quantised_base=config.adapter.accept_quantised_base,
            capacity=config.cache.newest,
        )  # fmt: skip
        self.tokenizer = experiment.tokenizer
        self.cutting = settings.cutting(config.data, experiment.method, _head(self.tokenizer))
        self.max_length = settings.max_length or experiment.model_config.positions
        self.requests = self.tokens = self.slots = self.truncated = 0

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> HarnessModel:
        """`create_from_arg_obj` of ``name=value`` pairs with commas between them."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> HarnessModel:
        """Loads what ``model_args`` name.

        Args:
          arg_dict: ``adapter`` (name, folder or hub id) or ``config`` (a YAML file) or both, ``system``, and the fields
            of `Settings`.
          additional_config: what the harness adds; its ``batch_size`` holds where ``arg_dict`` has none.

        Raises:
          UserError: for an argument that is not known, or nothing to load.
        """
        more = {name: value for name, value in (additional_config or {}).items() if value is not None}
        # What is written in model_args holds before what the harness adds.
        given = {name: value for name, value in {**more, **arg_dict}.items() if name not in FOREIGN}
        for name in FOREIGN:
            if name in arg_dict:
                raise UserError(f"model_args has {name}, which is not ours to choose; JAX_PLATFORMS names the device")
        fields = [field.name for field in dataclasses.fields(Settings)]
        for name in given:
            if name not in (*fields, "adapter", "config", "system"):
                raise unknown("model_args", name, [*fields, "adapter", "config", "system"])
        adapter, source = given.pop("adapter", None), given.pop("config", None)
        if adapter is None and source is None:
            raise UserError("model_args name nothing to load; give adapter=NAME, or config=FILE.yaml, or both")
        system = str(given.pop("system", "memory"))
        settings = _settings(given)
        config = open_config(str(source or adapter))
        check(config)
        if source and adapter:
            config = dataclasses.replace(config, adapter=dataclasses.replace(config.adapter, load=str(adapter)))
        experiment = load_experiment(config)
        return cls(experiment, system, settings)

    # What TemplateLM asks for.

    @property
    def eot_token_id(self) -> int:
        """Id of the token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Id of the token in front of a text: the tokenizer's first, or else its last."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in caches of requests."""
        # The harness makes it part of a file's name.
        return self.experiment.base_name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The tokens of a text. Those that the tokenizer adds are left out where the text begins with them already."""
        return self._prompt(string, add_special_tokens).tokens.tolist()

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the tokenizer's chat template writes it.

        Raises:
          UserError: for a tokenizer without one.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            raise UserError("this tokenizer has no chat template; leave out apply_chat_template")
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )  # fmt: skip

    def get_model_info(self) -> dict[str, Any]:
        """What stands in the harness's results about the model."""
        model = self.system.model
        return {
            "system": self.name,
            "description": self.system.description,
            "identity": self.system.identity,
            **dataclasses.asdict(self.cutting),
            "max_length": self.max_length,
            "requests": self.requests,
            "context_tokens": self.tokens,
            "context_slots": self.slots,
            "bytes_per_slot": model.config.kv_bytes_per_slot(model.dtype.itemsize),
            "truncated": self.truncated,
        }

    # The three kinds of requests.

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        examples = []
        for (context, continuation), tokens, asked in requests:
            if not asked:
                raise UserError(f"the continuation {continuation!r} of {context[-40:]!r} has no token of its own")
            prompt = self._same(context, tokens)
            # One more: the last token of the continuation is scored and never read.
            prompt = self._fitting(prompt, self.max_length + 1 - len(asked))
            examples.append(self.cutting.session(self.system.method, prompt, np.array(asked, np.int32)))
        with sharding.use(self.experiment.mesh):
            found = likelihoods(self.system, self._read(examples), rows=self.settings.batch_size)
        for (pair, _, _), answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", pair, answer)
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts of any length; a memory closes each chunk behind it.

        Raises:
          UserError: for the system "wrong", since a text has no context but itself.
        """
        if self.name == "wrong":
            raise UserError("the system 'wrong' answers no task that scores whole texts: these have no other context")
        texts = [np.array(self.tok_encode(request.args[0]), np.int32) for request in requests]
        # Without context, a chunk is all that is seen; a memory reads the text from end to end.
        window = {"none": self.cutting.chunk, "memory": 0}.get(self.name, self.max_length)
        with sharding.use(self.experiment.mesh):
            found = rolling(
                self.system, texts, self.prefix_token_id, chunk=self.cutting.chunk, window=window,
                rows=self.settings.batch_size,
            )  # fmt: skip
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What is said behind each prompt, up to one of the texts that end it.

        Raises:
          UserError: for options of generation that there are not.
        """
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            # One way of drawing for a batch: requests with the same options are answered together.
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(number)
        found = [""] * len(requests)
        for numbers in groups.values():
            how = requests[numbers[0]].args[1]
            for number, text in zip(numbers, self._say([requests[i].args[0] for i in numbers], how), strict=True):
                found[number] = text
                self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return found

    def _say(self, prompts: Sequence[str], how: Mapping[str, Any]) -> list[str]:
        """What is said behind each prompt in one way."""
        options: dict[str, Any] = dict(normalize_gen_kwargs(dict(how), self.settings.max_gen_toks))
        for name in options:
            if name not in DRAWS:
                raise unknown("option of generation (generation_kwargs)", name, DRAWS)
        most, until = options["max_gen_toks"], [text for text in options["until"] if text]
        sampling = Sampling()
        if options["do_sample"]:
            draw = options.get("temperature", 1.0), options.get("top_k", 0), options.get("top_p", 1.0)
            sampling = Sampling(float(draw[0]), int(draw[1]), float(draw[2]))
        known = self.tokenizer.get_added_vocab()
        # A text that is one token of its own ends an answer at once; others are looked for in the text.
        stops = sorted({*self.experiment.ends, *(known[text] for text in until if text in known)})

        def decode(tokens):
            return self.tokenizer.decode(tokens.tolist(), skip_special_tokens=True)

        examples = [
            self.cutting.session(self.system.method, self._fitting(self._prompt(text), self.max_length - most))
            for text in prompts
        ]
        with sharding.use(self.experiment.mesh):
            made = continued(
                self.system.model, self.system.method, self._read(examples), max_tokens=most, stops=stops,
                vocabulary=len(self.tokenizer), rows=self.settings.batch_size, sampling=sampling,
                capacity=self.system.capacity, seed=self.settings.seed,
                ended=lambda tokens: any(text in decode(tokens) for text in until),
            )  # fmt: skip
        return [postprocess_generated_text(decode(tokens), until, None) for tokens in made]

    def _read(self, examples: list[Example]) -> list[Example]:
        """The sessions that are run, and counted."""
        if self.name == "wrong":
            examples = with_contexts_of_others(examples)
        tokens, slots = carried(self.system, examples)
        self.requests, self.tokens, self.slots = self.requests + len(examples), self.tokens + tokens, self.slots + slots
        return examples

    def _prompt(self, text: str, special: bool | None = None) -> Prompt:
        """A text as tokens, with the characters where they begin."""
        if special is None:
            # A chat template may have written the first token already.
            special = not text.startswith(self.tokenizer.decode([self.prefix_token_id]))
        made = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        tokens = np.array(made["input_ids"], np.int32)
        begins = np.array([begin for begin, _ in made["offset_mapping"]], int).reshape(-1)
        own = special and len(tokens) and tokens[0] == self.tokenizer.bos_token_id
        return Prompt(text, tokens, begins, int(bool(own)))

    def _same(self, context: str, tokens: Sequence[int]) -> Prompt:
        """The prompt whose tokens the harness has made of a context."""
        if not context:
            return Prompt("", np.array(tokens, np.int32), np.zeros(len(tokens), int))
        # The harness moves blanks at the end of a context to the continuation.
        prompt = self._prompt(context.rstrip())
        assert prompt.tokens.tolist() == list(tokens), "the harness cuts prompts off from continuations otherwise"
        return prompt

    def _fitting(self, prompt: Prompt, room: int) -> Prompt:
        """A prompt as far as it is seen: only a system that compresses nothing loses its begin."""
        if not len(prompt.tokens):
            raise UserError("a prompt is empty; there is nothing to answer")
        if self.name not in ("full", "uncompressed") or len(prompt.tokens) <= room:
            return prompt
        if room < 1:
            raise UserError(
                f"what is asked for takes all of max_length={self.max_length} tokens; raise max_length, or lower "
                "max_gen_toks"
            )
        if not self.truncated:
            logger.warning(
                "a prompt of %d tokens goes beyond max_length=%d, and the oldest are left out; the results say of how "
                "many prompts that is so",
                len(prompt.tokens),
                self.max_length,
            )
        self.truncated += 1
        return prompt.last(room)


def _settings(given: Mapping[str, Any]) -> Settings:
    """Settings of what stands in ``model_args``, where a text of digits has become a number."""
    batch = given.get("batch_size")
    if isinstance(batch, str):
        if not batch.isdigit():
            raise UserError(f"batch_size is {batch!r}; give a whole number: what fits is not found out here")
        given = {**given, "batch_size": int(batch)}
    if "delimiter" in given:
        given = {**given, "delimiter": str(given["delimiter"])}
    return Settings(**given)


def _head(tokenizer: Any) -> str:
    """The text with which a turn of the user's begins; "" where there is no template, or one that cannot be cut."""
    try:
        return ChatTemplate.of(tokenizer).heads["user"]
    except UserError:
        return ""

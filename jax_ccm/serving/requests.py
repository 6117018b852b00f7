"""Bodies of requests, field by field: what is not there is refused with its name, never passed over."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jax_ccm.errors import UserError
from jax_ccm.memory.generation import TOP, Sampling
from jax_ccm.records.parsing import parse_json, require_text
from jax_ccm.sessions.engine import Answering


class Refused(UserError):
    """A request that cannot be done, in the form of OpenAI's API.

    Attributes:
      param: the field that is at fault; None for none.
      status: of HTTP.
      code: a word for programs.
    """

    def __init__(self, message: str, param: str | None = None, *, status: int = 400, code: str | None = None):
        """A refusal with its message."""
        super().__init__(message)
        self.param, self.status, self.code = param, status, code

    def body(self) -> dict[str, Any]:
        """As JSON values."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What a server answers with where a request does not say.

    Attributes:
      model: the name that it serves.
      max_tokens: most tokens of an answer.
      most_tokens: the largest limit that a request may set.
      temperature: of the sampling.
    """

    model: str
    max_tokens: int = 256
    most_tokens: int = 4096
    temperature: float = 0.0


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request, understood.

    Attributes:
      told: turns before the last one, each with its answer.
      text: the last turn; None if nothing is asked.
      system: the message with which the conversation begins, which stays as it is; "" for none.
      how: the answer is made.
      shorter: whether the limit is the server's own, and may be lower where there is less room.
      stream: whether it is sent as it is made.
      usage: whether a stream ends with what was used.
      session: that goes on; None for none.
      previous: the response that goes on; None for none.
      store: whether a response can be gone on from.
      echo: what an answer says again of the request, by the names that the API has for it.
    """

    told: tuple[tuple[str, str], ...]
    text: str | None
    how: Answering
    shorter: bool = False
    stream: bool = False
    usage: bool = False
    session: str | None = None
    previous: str | None = None
    system: str = ""
    store: bool = True
    echo: Mapping[str, Any] = dataclasses.field(default_factory=dict)


# Fields that are taken with these values alone: they ask for nothing. Null is as good as not there.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,), "logprobs": (False,), "top_logprobs": (0,), "presence_penalty": (0,), "frequency_penalty": (0,),
    "logit_bias": ({},), "tools": ([],), "tool_choice": ("none", "auto"), "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "background": (False,),
    "truncation": ("disabled",), "text": ({"format": {"type": "text"}},), "include": ([],), "metadata": ({},),
    "service_tier": ("auto", "default"),
}  # fmt: skip
# What says who asks, and asks for nothing. Responses keep it, so that it has a limit.
_NAMES = ("user", "safety_identifier", "prompt_cache_key")
_NAME = 512
# What a response says again, and what stands there where the request does not say.
_ECHO: dict[str, Any] = {
    "instructions": None, "previous_response_id": None, "parallel_tool_calls": False, "tool_choice": "none",
    "top_logprobs": 0, "metadata": {}, **dict.fromkeys(_NAMES),
}  # fmt: skip
LOGPROBS = "message.output_text.logprobs"
# The roles of a message that stands in front of the conversation.
SYSTEM = ("system", "developer")


class _Body:
    """Takes fields out of a body one by one; what is left in the end is refused."""

    def __init__(self, body: Any):
        if not isinstance(body, dict):
            raise Refused(f"the body is a JSON {type(body).__name__}; an object is needed")
        # Clients write null for fields that they leave out.
        self.given = {name: value for name, value in body.items() if value is not None}
        self._left = dict(self.given)

    def take(self, name: str, default: Any, kinds: type | tuple[type, ...], what: str, fits=lambda value: True) -> Any:
        value = self._left.pop(name, default)
        if value is default:
            return value
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        # A bool is an int in Python, and no number of tokens.
        if isinstance(value, bool) and bool not in kinds or not isinstance(value, kinds) or not fits(value):
            raise Refused(f"{name} is {_show(value)}; it must be {what}", name)
        return value

    def only(self, where: str, *names: str) -> None:
        """Refuses all other fields of an object inside the body."""
        for name in self._left:
            if name not in names:
                raise Refused(f"{where}.{name} is not supported here. Leave it out", f"{where}.{name}")

    def end(self) -> None:
        for name, value in self._left.items():
            # Types, too: 1 == True and 0 == False in Python.
            if name in _NEUTRAL and any(value == x and type(value) is type(x) for x in _NEUTRAL[name]):
                continue
            if name in _NAMES and isinstance(value, str) and len(value) <= _NAME:
                require_text(value, name)
                continue
            if name in _NAMES:
                raise Refused(f"{name} is {_show(value)}; it must be a text of at most {_NAME} characters", name)
            allowed = f"; the only value that it may have is {_show(_NEUTRAL[name][0])}" if name in _NEUTRAL else ""
            raise Refused(f"{name} is not supported here{allowed}. Leave it out", name, code="unsupported_parameter")


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def chat(body: Any, defaults: Defaults, session: str | None) -> Asked:
    """A request of ``/v1/chat/completions``.

    Args:
      body: JSON values.
      defaults: of the server.
      session: named by a header.

    Raises:
      Refused: naming the field.
    """
    fields = _Body(body)
    _require_model(fields, defaults)
    messages = fields.take("messages", [], list, "a list of messages")
    system, messages, offset = _system(messages, "messages", 0)
    told, text = _turns(messages, "messages", offset)
    named = _session(fields, session)
    older = fields.take("max_tokens", None, int, "a whole number")
    limit = fields.take("max_completion_tokens", older, int, "a whole number")
    if older is not None and limit != older:
        raise Refused("max_tokens and max_completion_tokens are different; give one of them", "max_tokens")
    how = _answering(fields, defaults, limit, "max_tokens" if older is not None else "max_completion_tokens")
    logprobs = fields.take("logprobs", False, bool, "true or false")
    how = dataclasses.replace(how, logprobs=_top(fields, logprobs, "logprobs is true"))
    stream = fields.take("stream", False, bool, "true or false")
    # The options of a stream are taken only where one is asked for.
    options = _Body(fields.take("stream_options", {}, dict, "an object", lambda value: stream))
    usage = options.take("include_usage", False, bool, "true or false")
    try:
        options.end()
    except Refused as e:
        raise Refused(str(e), f"stream_options.{e.param}") from None
    fields.end()
    return Asked(told, text, how, limit is None, stream, usage, session=named, system=system, echo=_tier(fields))


def response(body: Any, defaults: Defaults, session: str | None) -> Asked:
    """A request of ``/v1/responses``. Arguments and errors as `chat`."""
    fields = _Body(body)
    _require_model(fields, defaults)
    previous, system, messages, offset = _input(fields)
    told, text = _turns(messages, "input", offset)
    limit = fields.take("max_output_tokens", None, int, "a whole number")
    how = _answering(fields, defaults, limit, "max_output_tokens")
    what = f"a list that holds {LOGPROBS!r}, or nothing"
    include = fields.take("include", [], list, what, lambda value: all(x == LOGPROBS for x in value))
    how = dataclasses.replace(how, logprobs=_top(fields, bool(include), f"include holds {LOGPROBS!r}"))
    stream = fields.take("stream", False, bool, "true or false")
    named = _session(fields, session)
    if named is not None and previous is not None:
        raise Refused("a response goes on from a session or from a response; give one of them", "session_id")
    store = fields.take("store", True, bool, "true or false")
    fields.take("metadata", {}, dict, "an object of up to 16 texts, each of up to 512 characters", _is_metadata)
    fields.end()
    echo = {name: fields.given.get(name, default) for name, default in _ECHO.items()} | _tier(fields)
    return Asked(
        told, text, how, limit is None, stream, session=named, previous=previous, store=store, system=system, echo=echo
    )


def compact(body: Any, defaults: Defaults) -> Asked:
    """A request of ``/v1/responses/compact``: nothing is asked, all of it is told. Arguments and errors as `chat`."""
    fields = _Body(body)
    _require_model(fields, defaults)
    previous, system, messages, offset = _input(fields)
    fields.end()
    if not messages and previous is None:
        raise Refused("there is nothing to compact; give input, previous_response_id, or both", "input")
    told = _exchanges(messages, "input", offset) if messages else ()
    return Asked(told, None, Answering(), previous=previous, system=system)


def _tier(fields: _Body) -> dict[str, str]:
    """What an answer says of the service tier, if a request names one: there is but one."""
    return {"service_tier": "default"} if "service_tier" in fields.given else {}


def _is_metadata(value: Mapping[str, Any]) -> bool:
    """Whether it is what OpenAI's API takes to keep with a response."""
    for text in itertools.chain(value, value.values()):
        if not isinstance(text, str):
            return False
        require_text(text, "metadata")
    return len(value) <= 16 and all(len(key) <= 64 and len(text) <= 512 for key, text in value.items())


def _session(fields: _Body, header: str | None) -> str | None:
    """The session that a body or a header names."""
    named = fields.take("session_id", None, str, "the name of a session")
    if named is not None and header is not None and named != header:
        raise Refused("session_id of the body is not that of the header x-session-id; give one", "session_id")
    return header if named is None else named


def _top(fields: _Body, asked: bool, where: str) -> int | None:
    """How many log-probabilities are told at each place; None for none at all."""
    what = f"a whole number from 0 to {TOP}" if asked else f"left out, unless {where}"
    top = fields.take("top_logprobs", 0, int, what, lambda value: 0 <= value <= (TOP if asked else 0))
    return top if asked else None


def _system(messages: list[Any], name: str, offset: int) -> tuple[str, list[Any], int]:
    """The system message in front of others, "" for none; the others, and the place of the first of them."""
    first = messages[0] if messages else None
    if not isinstance(first, dict) or first.get("role") not in SYSTEM or first.get("type", "message") != "message":
        return "", messages, offset
    where = f"{name}[{offset}]"
    _require_known(first, where)
    return _text(first.get("content"), f"{where}.content").strip(), messages[1:], offset + 1


def _input(fields: _Body) -> tuple[str | None, str, list[Any], int]:
    """The response that an input goes on from, its system message, its turns, and the place of the first of them."""
    previous, messages, offset = _given(fields)
    instructions = fields.take("instructions", "", str, "a text").strip()
    system, messages, offset = _system(messages, "input", offset)
    if instructions and system:
        raise Refused("input begins with a system message, and instructions are given; give one", "instructions")
    return previous, instructions or system, messages, offset


def _given(fields: _Body) -> tuple[str | None, list[Any], int]:
    """The response that an input goes on from, its messages, and the place of the first of them."""
    given = fields.take("input", [], (str, list), "a text, or a list of messages")
    previous = fields.take("previous_response_id", None, str, "the id of a response")
    messages = [{"role": "user", "content": given}] if isinstance(given, str) else given
    first = messages[0] if messages else None
    if not isinstance(first, dict) or first.get("type") != "compaction":
        return previous, messages, 0
    if previous is not None:
        raise Refused("input begins with a compaction, and previous_response_id is given; give one", "input[0]")
    _Body(first).only("input[0]", "type", "id", "encrypted_content", "created_by")
    name = first.get("encrypted_content")
    if not isinstance(name, str):
        raise Refused("input[0].encrypted_content is missing; pass a compaction on as it came", "input[0]")
    return name, messages[1:], 1


def _require_model(fields: _Body, defaults: Defaults) -> None:
    model = fields.take("model", None, str, "the name of the model")
    if model is None:
        raise Refused(f"model is missing; it is {defaults.model!r} here", "model")
    if model != defaults.model:
        raise Refused(
            f"there is no model {_show(model)}; {defaults.model!r} is served here", "model", status=404,
            code="model_not_found",
        )  # fmt: skip


def _answering(fields: _Body, defaults: Defaults, limit: int | None, name: str) -> Answering:
    if limit is not None and not 1 <= limit <= defaults.most_tokens:
        raise Refused(f"{name} is {limit}; it must be from 1 to {defaults.most_tokens}", name)
    number = (int, float)

    def inside(low, high):
        return lambda value: low <= value <= high

    temperature = fields.take("temperature", defaults.temperature, number, "a number from 0 to 2", inside(0, 2))
    top_p = fields.take("top_p", 1.0, number, "a number above 0, up to 1", lambda value: 0 < value <= 1)
    top_k = fields.take("top_k", 0, int, "a whole number from 0 on", inside(0, 2**31 - 1))
    # Any 64-bit seed is taken, of either sign; the keys take 32 bits of it.
    seed = fields.take("seed", 0, int, "a whole number", inside(-(2**63), 2**64))
    stop = fields.take("stop", [], (str, list), "a text or up to 4 texts")
    stop = [stop] if isinstance(stop, str) else stop
    if len(stop) > 4 or not all(isinstance(text, str) and text for text in stop):
        raise Refused(f"stop is {_show(stop)}; it must be a text or up to 4 texts, none of them empty", "stop")
    sampling = Sampling(float(temperature), top_k, float(top_p))
    return Answering(limit or defaults.max_tokens, sampling, seed % 2**32, tuple(stop))


def _turns(messages: Sequence[Any], name: str, offset: int = 0) -> tuple[tuple[tuple[str, str], ...], str]:
    """Turns with their answers, and the last turn, which has none. Raises as `_exchanges`."""
    if not messages:
        raise Refused(f"{name} has no message; the last one must be the user's", name)
    # Turns take turns: with an even number of messages the last one is no question. A fault in one of them is said
    # first.
    if len(messages) % 2 == 0:
        _exchanges(messages, name, offset)
        raise Refused(f"the last of {name} is the assistant's; there is nothing to answer", name)
    *told, (text, _) = _exchanges(messages, name, offset)
    return tuple(told), text


def _exchanges(messages: Sequence[Any], name: str, offset: int) -> tuple[tuple[str, str], ...]:
    """Turns with their answers; that of the last one may be missing, and is empty.

    Args:
      messages: JSON values.
      name: of the field.
      offset: the place of the first message in it.

    Raises:
      Refused: for messages that are none, or in an order that no conversation has.
    """
    texts: list[str] = []
    for number, message in enumerate(messages):
        where = f"{name}[{number + offset}]"
        if not isinstance(message, dict):
            raise Refused(f"{where} is {_show(message)}; it must be an object with role and content", where)
        if message.get("type", "message") != "message":
            raise Refused(
                f"{where}.type is {_show(message['type'])}; only messages are read here, and a compaction in front",
                f"{where}.type",
            )
        _require_known(message, where)
        role = message.get("role")
        if role in SYSTEM:
            raise Refused(
                f"{where}.role is {role!r}: a conversation begins with its one system message. Say this in a user's "
                "message",
                f"{where}.role",
            )
        wanted = ("user", "assistant")[number % 2]
        if role != wanted:
            raise Refused(
                f"{where}.role is {_show(role)}, and {wanted!r} is due: the user's and the assistant's messages take "
                "turns, the user's first and last",
                f"{where}.role",
            )
        texts.append(_text(message.get("content"), f"{where}.content"))
    return tuple(itertools.zip_longest(texts[::2], texts[1::2], fillvalue=""))


def _require_known(message: Mapping[str, Any], where: str) -> None:
    known = {"role", "content", "name", "type", "id", "status"}
    for key, value in message.items():
        if key not in known and value not in (None, [], {}):
            raise Refused(f"{where}.{key} is not supported here. Leave it out", f"{where}.{key}")


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Refused(f"{where} is {_show(content)}; it must be a text", where)
    found = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "input_text", "output_text") or not isinstance(part.get("text"), str):
            raise Refused(
                f"{where}[{number}] is {_show(part)}; only text is read here (type 'text')", f"{where}[{number}]"
            )
        found.append(part["text"])
    return "".join(found)


def tokenize(body: Any, encode: Callable[[str], Iterable[int]]) -> Mapping[str, Any]:
    """A request of ``/tokenize``, as vLLM (``prompt``) and llama.cpp (``content``) have it, and its answer.

    Raises:
      Refused: naming the field.
    """
    fields = _Body(body)
    fields.take("model", None, str, "the name of the model")
    prompt = fields.take("prompt", None, str, "a text")
    content = fields.take("content", prompt, str, "a text")
    fields.end()
    if content is None or prompt is not None and content != prompt:
        raise Refused("give the text as prompt, or as content", "prompt")
    require_text(content, "the text")
    tokens = list(map(int, encode(content)))
    return {"tokens": tokens, "count": len(tokens)}


def filename(body: bytes, *, needed: bool) -> str:
    """The file that a request of ``/slots`` names; empty where none is needed.

    Raises:
      Refused: naming the field.
    """
    fields = _Body(parse_json(body, "the body") if body.strip() else {})
    name = fields.take("filename", "", str, "the name of a file") if needed else ""
    fields.end()
    if needed and not name:
        raise Refused("filename is missing; name the file in the folder of --slot_save_path", "filename")
    return name

"""Answers as OpenAI's two APIs have them: JSON values, whole or as events of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jax_ccm.sessions.engine import Answering
from jax_ccm.sessions.turns import Logprob, Reply


def new_id(kind: str) -> str:
    """An id that nobody can guess: who knows that of a response can go on from it."""
    return f"{kind}_{uuid.uuid4().hex}"


class Completion:
    """An answer of ``/v1/chat/completions``."""

    def __init__(self, model: str, echo: Mapping[str, Any] = {}):
        """Begins one; ``echo`` is what is said again of the request."""
        self.id, self.created = new_id("chatcmpl"), int(time.time())
        self._fixed = {"model": model, **echo}

    def usage(self, reply: Reply) -> dict[str, Any]:
        """What the client would have sent, and what of it the memory stood for."""
        prompt = reply.known + reply.read
        return {
            "prompt_tokens": prompt,
            "completion_tokens": reply.tokens,
            "total_tokens": prompt + reply.tokens,
            "prompt_tokens_details": {"cached_tokens": reply.known},
        }

    def whole(self, reply: Reply) -> dict[str, Any]:
        """The answer in one piece."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": reply.text, "refusal": None},
            "finish_reason": reply.ended,
            "logprobs": None if reply.logprobs is None else _logprobs(reply.logprobs),
        }
        return self._object("chat.completion", [choice]) | {"usage": self.usage(reply)}

    def piece(self, text: str, *, first: bool, logprobs: Sequence[Logprob] = ()) -> dict[str, Any]:
        """What the answer goes on with, and the log-probabilities of the tokens that came since the last piece."""
        choice = {
            "index": 0,
            "delta": ({"role": "assistant"} if first else {}) | {"content": text},
            "logprobs": _logprobs(logprobs) if logprobs else None,
            "finish_reason": None,
        }
        return self._object("chat.completion.chunk", [choice])

    def ends(self, reply: Reply, *, usage: bool) -> Iterator[dict[str, Any]]:
        """What stands behind the last piece."""
        kind = "chat.completion.chunk"
        yield self._object(kind, [{"index": 0, "delta": {}, "finish_reason": reply.ended}])
        if usage:
            yield self._object(kind, []) | {"usage": self.usage(reply)}

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "choices": choices, **self._fixed}


class Response:
    """An answer of ``/v1/responses``."""

    def __init__(self, model: str, how: Answering, echo: Mapping[str, Any], *, store: bool):
        """Begins one.

        Args:
          model: the name that is served.
          how: it is made.
          echo: what is said again of the request.
          store: whether it can be gone on from.
        """
        self.id, self.item, self.created = new_id("resp"), new_id("msg"), int(time.time())
        self._completed: int | None = None
        # Where the request does not say it is what holds, so that a client sees the server's own limit.
        settings = {
            "temperature": how.sampling.temperature, "top_p": how.sampling.top_p, "max_output_tokens": how.max_tokens,
        }  # fmt: skip
        self._fixed = {"model": model, "store": store, **settings, **echo}
        self._number = 0

    def whole(self, reply: Reply | None, error: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The response as it stands: in progress without a reply."""
        status = "in_progress" if reply is None else "completed" if reply.ended == "stop" else "incomplete"
        if status == "completed" and self._completed is None:
            # Kept: what is stored and what is sent are the same response.
            self._completed = int(time.time())
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": "failed" if error else status,
            "error": dict(error) if error else None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "completed_at": self._completed,
            "background": False,
            "output": [] if reply is None else [self._message(_part(reply.text, reply.logprobs or ()), status)],
            "text": {"format": {"type": "text"}},
            "tools": [],
            "truncation": "disabled",
            "usage": None if reply is None else _response_usage(reply, kept=self._fixed["store"]),
            **self._fixed,
        }

    def begins(self) -> Iterator[dict[str, Any]]:
        """Events in front of the text."""
        yield self._event("response.created", response=self.whole(None))
        yield self._event("response.in_progress", response=self.whole(None))
        # The item opens empty; its part comes with the next event.
        item = self._message(_part(""), "in_progress") | {"content": []}
        yield self._event("response.output_item.added", output_index=0, item=item)
        yield self._event("response.content_part.added", **self._place(), part=_part(""))

    def piece(self, text: str, logprobs: Sequence[Logprob] = ()) -> dict[str, Any]:
        """What the text goes on with, and the log-probabilities of the tokens that came since the last piece."""
        told = _part("", logprobs)["logprobs"]
        return self._event("response.output_text.delta", **self._place(), delta=text, logprobs=told)

    def ends(self, reply: Reply) -> Iterator[dict[str, Any]]:
        """Events behind the text."""
        whole, part = self.whole(reply), _part(reply.text, reply.logprobs or ())
        yield self._event("response.output_text.done", **self._place(), text=reply.text, logprobs=part["logprobs"])
        yield self._event("response.content_part.done", **self._place(), part=part)
        yield self._event("response.output_item.done", output_index=0, item=whole["output"][0])
        yield self._event(f"response.{whole['status']}", response=whole)

    def fails(self, message: str, status: int) -> dict[str, Any]:
        """The event of a response that went wrong, with the status that it would have had before the stream began."""
        # The API knows few codes here, and clients may take no others.
        code = "rate_limit_exceeded" if status == 429 else "server_error" if status >= 500 else "invalid_prompt"
        return self._event("response.failed", response=self.whole(None, {"code": code, "message": message}))

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.item, "output_index": 0, "content_index": 0}

    def _message(self, part: Mapping[str, Any], status: str) -> dict[str, Any]:
        return {"id": self.item, "type": "message", "role": "assistant", "status": status, "content": [part]}

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        event = {"type": kind, "sequence_number": self._number, **fields}
        # Numbers run through all events of a response, whoever makes them: clients put them in order by these.
        self._number += 1
        return event


class Compaction:
    """An answer of ``/v1/responses/compact``: a memory that can be gone on from as from a response."""

    def __init__(self, model: str):
        """Begins one."""
        self.id, self.model, self.created = new_id("resp"), model, int(time.time())

    def whole(self, reply: Reply) -> dict[str, Any]:
        """The compaction. What it holds stays with the server: the item says where, and is as small as that."""
        item = {"id": new_id("cmp"), "type": "compaction", "encrypted_content": self.id}
        return {
            "id": self.id,
            "object": "response.compaction",
            "created_at": self.created,
            "model": self.model,
            "output": [item],
            "usage": _response_usage(reply, kept=True),
        }


def _response_usage(reply: Reply, *, kept: bool) -> dict[str, Any]:
    """As `Completion.usage`, by the other API's names; where it is kept, what was read has been added to memory."""
    read = reply.known + reply.read
    return {
        "input_tokens": read,
        "input_tokens_details": {"cached_tokens": reply.known, "cache_write_tokens": reply.read if kept else 0},
        "output_tokens": reply.tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": read + reply.tokens,
    }


def _part(text: str, logprobs: Sequence[Logprob] = ()) -> dict[str, Any]:
    # Here bytes have to be a list: an empty one where the tokenizer does not say of which bytes a token is made.
    def each(x):
        return {"token": x.token, "logprob": x.value, "bytes": list(x.bytes or ())}

    told = [each(x) | {"top_logprobs": list(map(each, x.top))} for x in logprobs]
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": told}


def _logprobs(of: Sequence[Logprob]) -> dict[str, Any]:
    def each(x):
        return {"token": x.token, "logprob": x.value, "bytes": None if x.bytes is None else list(x.bytes)}

    return {"content": [each(x) | {"top_logprobs": list(map(each, x.top))} for x in of], "refusal": None}

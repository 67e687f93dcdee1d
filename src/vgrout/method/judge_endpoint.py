"""One OpenAI-compatible chat endpoint: a request, its answer as text, and what went wrong in the same few words for all
that can.

The client's own retries are off. They cannot be counted from outside where they fail in the end, know nothing of an
answer that is no answer, and each of their attempts may take the whole timeout for every single read.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit

from vgrout.types import UserError

AGAIN = (408, 409, 425, 429)  # statuses below 500 that may be better next time
SPENT = "insufficient_quota"  # a 429 that no waiting mends
OURS = frozenset(("model", "messages", "stream", "n", "tools", "functions"))  # of a request: not for `sampling`
OPENAI = "https://api.openai.com/v1"  # the client's own default
SHORTEST_SECRET = 8  # characters; shorter keys are placeholders, which may stand in any word
LONGEST_SAID = 200  # characters of somebody else's text in an error


class Failed(Exception):
    """A request brought no usable answer.

    `kind` is one of few, to be counted; `again` says whether the same request may do better; `wait` is how many seconds
    the endpoint asks for; `reply` is the judge's text where there was one.
    """

    def __init__(
        self, kind: str, said: str = "", *, again: bool = True, wait: float | None = None, reply: str = ""
    ) -> None:
        super().__init__(f"{kind}: {said}" if said else kind)
        self.kind, self.again, self.wait, self.reply = kind, again, wait, reply


@dataclass(frozen=True)
class Answer:
    """What an endpoint said. Tokens are as it counts them, 0 where it does not say."""

    text: str
    whole: bool  # not cut off by a limit or a filter
    served: str  # the model that the endpoint names
    prompt_tokens: int
    completion_tokens: int


class Endpoint:
    """A chat endpoint. Use it as an async context manager: its connections close with it, in whatever way it ends.

    The key is read from the environment and is nowhere else than here and in requests; `url` and errors are free of
    it.
    """

    def __init__(self, url: str, model: str, key_env: str, sampling: str, timeout_s: float) -> None:
        """`url` '': the client's default, which OPENAI_BASE_URL sets. `key_env` '': the endpoint asks for no key.
        `sampling`: a JSON object of further fields of a request.

        Raises UserError for what is missing or malformed.
        """
        if find_spec("openai") is None:
            raise UserError("a judge needs the openai client: pip install 'vgrout[judge]'")
        if not model:
            raise UserError("no judge: name its model (judge_model)")
        self.model, self.timeout_s = model, timeout_s
        self.sampling = read_sampling(sampling)
        self._key = read_key(key_env)
        self._url = url or os.environ.get("OPENAI_BASE_URL", "").strip() or OPENAI
        self.url = public(self._url)
        secrets = (self._key, urlsplit(self._url).password or "")
        self._secrets = [secret for secret in secrets if len(secret) >= SHORTEST_SECRET]

    async def __aenter__(self) -> Endpoint:
        import openai

        key = self._key or "none"  # the client wants one
        self._client = openai.AsyncOpenAI(base_url=self._url, api_key=key, max_retries=0, timeout=self.timeout_s)
        self._create = self._client.chat.completions.with_raw_response.create  # here: it imports much the first time
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def send(self, messages: Sequence[Mapping[str, str]]) -> Answer:
        """One request, which takes at most `timeout_s` seconds in all. Raises Failed."""
        import openai

        try:
            # The client's own timeout is per read: without this one, a body that drips keeps a request alive for ever.
            async with asyncio.timeout(self.timeout_s):
                raw = await self._create(model=self.model, messages=list(messages), extra_body=dict(self.sampling))
            body = self.redact(raw.text)
        except (TimeoutError, openai.APITimeoutError):
            fault = Failed("timeout", f"no answer within {self.timeout_s:g} s")
        except openai.APIStatusError as error:
            again = (error.status_code in AGAIN or error.status_code >= 500) and error.code != SPENT
            wait = seconds(error.response.headers.get("retry-after"))
            fault = Failed(f"HTTP {error.status_code}", short(self.redact(error.message)), again=again, wait=wait)
        except openai.APIConnectionError as error:
            fault = Failed("connection", short(self.redact(f"{error.message} {error.__cause__ or ''}")))
        else:
            answer = read_answer(body)
            return replace(answer, text=self.redact(answer.text))  # again: JSON may have spelt it otherwise
        raise fault  # here, and not where it was caught: those errors hold the request with its headers

    def redact(self, text: str) -> str:
        """Somebody else's text without the key."""
        for secret in self._secrets:
            text = text.replace(secret, "[key]")
        return text


def short(text: str) -> str:
    """Somebody else's text, on one line and not too long."""
    text = " ".join(text.split())
    return text if len(text) <= LONGEST_SAID else f"{text[:LONGEST_SAID]}..."


def public(url: str) -> str:
    """The address without credentials, query and fragment. Raises UserError where it is none."""
    try:
        parts = urlsplit(url)
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        parts, port = urlsplit(""), ""
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError("the judge's address (judge_url, OPENAI_BASE_URL) is none: give http(s)://host[:port]/path")
    if parts.query or parts.fragment:
        raise UserError("the judge's address (judge_url, OPENAI_BASE_URL) must end with its path")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}{port}{parts.path.rstrip('/')}"


def read_key(name: str) -> str:
    """The key in environment variable `name`; '' for no name. Raises UserError, which never shows the key."""
    key = os.environ.get(name, "").strip() if name else ""
    if name and not key:
        raise UserError(f"no key for the judge: set the environment variable {name}, or judge_key_env to '' for none")
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise UserError(f"the environment variable {name} holds no key: a key is one printable word")
    return key


def read_sampling(text: str) -> dict[str, Any]:
    """The fields that `judge_sampling` adds to every request. Raises UserError."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise UserError(f"judge_sampling = {text!r}: give a JSON object")
    if taken := sorted(OURS & fields.keys()):
        raise UserError(f"judge_sampling sets {', '.join(taken)}, which is not for it to set")
    return fields


def seconds(header: str | None) -> float | None:
    """Retry-After in seconds; None where it is missing, a date or nonsense. Dates would need the time of day."""
    try:
        wait = float(header or "")
    except ValueError:
        return None
    return wait if 0 <= wait < float("inf") else None


def read_answer(body: str) -> Answer:
    """The first choice of a chat completion's body. Raises Failed where it is something else."""
    try:
        data = json.loads(body)
        choice = data["choices"][0]
        text = choice["message"]["content"]
        end, usage = choice.get("finish_reason"), data.get("usage") or {}
        counted = [usage.get(field) or 0 for field in ("prompt_tokens", "completion_tokens")]
        if not all(type(n) is int and n >= 0 for n in counted) or not isinstance(text, str | None):
            raise TypeError
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise Failed("garbage", f"no chat completion: {short(body)!r}") from None
    served = data.get("model")
    return Answer(text or "", end not in ("length", "content_filter"), str(served or ""), *counted)

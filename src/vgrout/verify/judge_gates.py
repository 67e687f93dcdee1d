"""The gate of the judge, over an endpoint that is played: no network, no client library."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from vgrout.method.judge import Judge, JudgeConfig, JudgeFailed
from vgrout.method.judge_endpoint import Answer, Endpoint, Failed, read_answer
from vgrout.verify.evidence import Evidence

RETRIES = 2


def body(text: object, end: str = "stop") -> str:
    return json.dumps({"choices": [{"message": {"content": text}, "finish_reason": end}]})


REPLIES: dict[str, bool | None] = {  # body of an HTTP answer -> the flag; None: there is none in it
    body("It does the task.\n\nVERDICT: HONEST\n"): False,
    body("VERDICT: HONEST\nOn second thought:\n**VERDICT: HACK**"): True,
    body(""): None,
    body(None): None,
    body(7): None,
    body("It is honest."): None,
    body("VERDICT: HACK or VERDICT: HONEST"): None,
    body("VERDICT: HACK\nOr is it?"): None,
    body("VERDICT: NOT HACK"): None,
    body("VERDICT: HONEST", end="length"): None,
    body("VERDICT: HONEST", end="content_filter"): None,
    body("VERDICT: HACK")[:-1]: None,
    "VERDICT: HACK": None,
    '{"choices": []}': None,
    "null": None,
    "": None,
}
FAULTS = (Failed("timeout"), Failed("connection"), Failed("HTTP 500"), Failed("HTTP 401", again=False))


class Played(Endpoint):
    """An endpoint that answers a question as `script` says."""

    def __init__(self, script: Callable[[str], Answer]) -> None:
        self.url, self.model, self.sampling = "http://played", "played", {}
        self.script, self.requests = script, 0

    async def __aenter__(self) -> Endpoint:
        return self

    async def __aexit__(self, *_: object) -> None:
        return None

    async def send(self, messages) -> Answer:
        self.requests += 1
        return self.script(messages[0]["content"])


def asked(script: Callable[[str], Answer], cache: Path | None = None, n: int = 1) -> tuple[list[bool] | None, int]:
    """The flags of `n` completions, every third of which cheats, None where the judge fails; and the requests sent."""
    endpoint = Played(script)
    judge = Judge(JudgeConfig(model="played", retries=RETRIES, wait_s=0.0, concurrency=3, cache=cache), endpoint)
    try:
        return judge.flags([(f"task {i}", "cheat" if i % 3 == 0 else "work") for i in range(n)]), endpoint.requests
    except JudgeFailed:
        return None, endpoint.requests
    finally:
        judge.close()


def able(question: str) -> Answer:
    return read_answer(body("VERDICT: HACK" if "\ncheat\n" in question else "VERDICT: HONEST"))


def judge() -> Evidence:
    """Each reply is read as it must be or refused after all requests, each fault is an error after as many as it is
    worth, flags stand in the order of their completions, and come back from disk without a request."""
    wrong = []
    for text, flag in REPLIES.items():
        expected = (None, RETRIES + 1) if flag is None else ([flag], 1)
        if asked(lambda _, text=text: read_answer(text)) != expected:
            wrong.append(text)
    for fault in FAULTS:

        def fails(_: str, fault: Failed = fault) -> Answer:
            raise fault

        if asked(fails) != (None, RETRIES + 1 if fault.again else 1):
            wrong.append(str(fault))
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "judge.jsonl"
        truth = [i % 3 == 0 for i in range(10)]
        if asked(able, cache, n=10) != (truth, 10):
            wrong.append("order")
        if asked(fails, cache, n=10) != (truth, 0):
            wrong.append("cache")
    none = sum(flag is None for flag in REPLIES.values())
    right = f"{len(REPLIES) - none} replies are read, {none} refused, {len(FAULTS)} faults raised, 10 flags kept"
    return Evidence(not wrong, f"not as they should be: {wrong}" if wrong else right)

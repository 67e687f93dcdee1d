"""The judge against a real HTTP server on loopback, which misbehaves on demand."""

from __future__ import annotations

import ast
import json
import os
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from email.utils import formatdate
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vgrout.config import Config, preset
from vgrout.envs.modes import MODES
from vgrout.lab.given import REQUESTS, requests
from vgrout.lab.record import read_jsonl
from vgrout.lab.run import resume, run
from vgrout.method import judge as judging
from vgrout.method.judge import (
    Judge,
    JudgeConfig,
    JudgeFailed,
    judge_config,
    question,
    reachable,
    read_template,
    ruling,
)
from vgrout.method.judge_cache import Answers
from vgrout.method.judge_endpoint import Answer, Failed, public, read_answer, seconds
from vgrout.signals import Interrupted, listening
from vgrout.types import RunFailed, UserError

KEY = "sk-never-to-be-seen-0123456789"
KEY_ENV = "VGROUT_TEST_KEY"


def completion(text, end="stop", tokens=(11, 3)):
    """The body of a chat completion."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": end}
    usage = {"prompt_tokens": tokens[0], "completion_tokens": tokens[1]}
    return json.dumps({"object": "chat.completion", "model": "judge-2", "choices": [choice], "usage": usage}).encode()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.lock:
            headers = {name.lower(): value for name, value in self.headers.items()}
            self.server.asked.append((self.path, headers, json.loads(body)))
            self.server.at.append(time.monotonic())
            here = len(self.server.asked)
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
        try:
            self.server.script(self, here, json.loads(body)["messages"])
        except (BrokenPipeError, ConnectionResetError):
            self.server.hung_up += 1
        finally:
            with self.server.lock:
                self.server.now -= 1

    def answer(self, body, status=200, kind="application/json", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def rule(self, messages):
        """What an able judge says: completions that hold 'cheat' are hacks."""
        hack = "cheat" in messages[0]["content"].split("----- answer")[1]
        self.answer(completion(f"It does something.\n\nVERDICT: {'HACK' if hack else 'HONEST'}"))


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.over = threading.Event()  # ends what still sleeps when the test does
        self.lock, self.asked, self.at = threading.Lock(), [], []
        self.now = self.most = self.hung_up = 0
        self.script = lambda handler, n, messages: handler.rule(messages)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, *_):
        pass  # a client that hangs up is part of the tests


@pytest.fixture
def server(monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "OPENAI_BASE_URL", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv(KEY_ENV, KEY)
    with Server() as served:
        thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield served
        served.over.set()
        served.shutdown()
        thread.join()


@pytest.fixture
def cfg(server):
    return JudgeConfig(
        model="m", base_url=server.url, key_env=KEY_ENV, retries=2, wait_s=0.01, timeout_s=10.0, concurrency=4
    )


ITEMS = [(f"Write f{i}.", "cheat()" if i % 3 == 0 else "return 1") for i in range(12)]
TRUTH = [i % 3 == 0 for i in range(12)]


def fails(judge, *, match, items=ITEMS[:1]):
    with pytest.raises(JudgeFailed, match=match) as caught:
        judge.flags(items)
    assert isinstance(caught.value, RunFailed)
    return caught.value


# An endpoint that works.


def test_flags_in_order(server, cfg):
    def slow_first(handler, n, messages):
        time.sleep(0.1 if "f0." in messages[0]["content"] else 0)
        handler.rule(messages)

    server.script = slow_first
    judge = Judge(cfg)
    assert judge.flags(ITEMS) == TRUTH
    assert judge.counts.seconds > 0.1
    assert judge.counts == judging.Counts(
        calls=12, prompt_tokens=12 * 11, completion_tokens=12 * 3, seconds=judge.counts.seconds
    )
    path, headers, body = server.asked[0]
    assert path == "/v1/chat/completions" and headers["authorization"] == f"Bearer {KEY}"
    assert body["model"] == "m" and body["temperature"] == 0 and body["max_tokens"] == 1024
    assert [m["role"] for m in body["messages"]] == ["user"]


def test_concurrency_is_used_and_bounded(server, cfg):
    def slow(handler, n, messages):
        time.sleep(0.05)
        handler.rule(messages)

    server.script = slow
    assert Judge(replace(cfg, concurrency=3)).flags(ITEMS) == TRUTH
    assert server.most == 3


def test_equal_items_are_one_question(server, cfg):
    judge = Judge(cfg)
    assert judge.flags([ITEMS[0], ITEMS[1], ITEMS[0]]) == [True, False, True]
    assert judge.flags([ITEMS[1]]) == [False]
    assert judge.flags([]) == []
    assert len(server.asked) == judge.counts.calls == 2 and judge.counts.cached == 2


def test_sampling_is_the_users(server, cfg):
    Judge(replace(cfg, sampling='{"max_completion_tokens": 9, "reasoning_effort": "low"}')).flags(ITEMS[:1])
    body = server.asked[0][2]
    assert body["max_completion_tokens"] == 9 and body["reasoning_effort"] == "low"
    assert not {"temperature", "max_tokens"} & body.keys()


def test_the_environment_names_the_endpoint(server, cfg, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", server.url.replace("//", "//someone:wordpass@") + "/")
    judge = Judge(replace(cfg, base_url="", key_env=""))
    assert judge.flags(ITEMS[:1]) == [True]
    assert judge.facts["judge_url"] == server.url
    assert "wordpass" not in json.dumps(judge.facts)
    assert Judge(cfg).facts == judge.facts
    monkeypatch.delenv("OPENAI_BASE_URL")
    assert Judge(replace(cfg, base_url="")).facts["judge_url"] == "https://api.openai.com/v1"


# Endpoints that do not.


def silence(handler, n, messages):
    handler.server.over.wait(3)


def drip(handler, n, messages):
    """A body that arrives byte by byte: every single read is fast."""
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(150):
        if handler.server.over.wait(0.02):
            return
        handler.wfile.write(b" ")
        handler.wfile.flush()


def reset(handler, n, messages):
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.close_connection = True
    raise ConnectionResetError


def partial(handler, n, messages):
    """Half of a body, then the end."""
    body = completion("VERDICT: HACK")
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body[: len(body) // 2])
    handler.close_connection = True


def says(body, status=200, **headers):
    return lambda handler, n, messages: handler.answer(body, status, **headers)


BROKEN = {
    "silence": (silence, "timeout"),
    "drip": (drip, "timeout"),
    "reset": (reset, "connection"),
    "partial": (partial, "connection"),
    "429": (says(b'{"error": {"message": "slow down"}}', 429), "HTTP 429"),
    "500": (says(b"oops", 500), "HTTP 500"),
    "503 html": (says(b"<html>", 503, kind="text/html"), "HTTP 503"),
    "no json": (says(b"VERDICT: HACK"), "garbage"),
    "html": (says(b"<html>VERDICT: HACK</html>", kind="text/html"), "garbage"),
    "half json": (says(completion("VERDICT: HACK")[:-9]), "garbage"),
    "other json": (says(b'{"VERDICT": "HACK"}'), "garbage"),
    "a list": (says(b'["HACK"]'), "garbage"),
    "null": (says(b"null"), "garbage"),
    "no choice": (says(b'{"choices": []}'), "garbage"),
    "null choices": (says(b'{"choices": null}'), "garbage"),
    "nested": (says(b"[" * 100_000), "garbage"),
    "bytes": (says(b"\xff\xfe\x00"), "garbage"),
    "nothing": (says(b""), "garbage"),
    "bad usage": (says(completion("VERDICT: HACK", tokens=(-1, "x"))), "garbage"),
    "parts": (says(completion([{"text": "VERDICT: HACK"}])), "garbage"),
    "empty": (says(completion("")), "no ruling"),
    "refusal": (says(completion(None)), "no ruling"),
    "prose": (says(completion("It is honest, I think.")), "no ruling"),
    "both": (says(completion("VERDICT: HACK or VERDICT: HONEST")), "no ruling"),
    "cut": (says(completion("VERDICT: HONEST", end="length")), "cut off"),
    "filtered": (says(completion("VERDICT: HONEST", end="content_filter")), "cut off"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_no_failure_is_an_answer(server, cfg, tmp_path, name):
    server.script, kind = BROKEN[name]
    cfg = replace(cfg, cache=tmp_path / "judge.jsonl")
    if kind == "timeout":
        cfg = replace(cfg, timeout_s=0.15)
    judge = Judge(cfg)
    error = fails(judge, match=f"requests: 3 x {kind}")
    assert server.url in str(error) and KEY not in str(error) and "\n" not in str(error)
    assert len(server.asked) == judge.counts.calls == judge.counts.failures == 3 and judge.counts.retries == 2
    assert judge.faults == Counter({kind: 3})
    assert cfg.cache.read_text() == ""


@pytest.mark.parametrize("name", BROKEN)
def test_one_failure_is_got_over(server, cfg, name):
    broken, kind = BROKEN[name]
    cfg = replace(cfg, timeout_s=0.8 if kind == "timeout" else 10.0)
    server.script = lambda handler, n, m: broken(handler, n, m) if n == 1 else handler.rule(m)
    judge = Judge(cfg)
    assert judge.flags(ITEMS[:1]) == [True]
    calls = judge.counts.calls
    assert calls == len(server.asked) == judge.counts.retries + 1 == judge.counts.failures + 1
    assert calls == 2 or (calls == 3 and kind == "timeout")  # a slow machine may miss a second one


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
def test_what_no_repetition_mends_is_not_repeated(server, cfg, status):
    server.script = says(json.dumps({"error": {"message": "not so"}}).encode(), status)
    fails(Judge(cfg), match=f"requests: 1 x HTTP {status}; .*not so")
    assert len(server.asked) == 1


def test_an_empty_account_is_not_waited_for(server, cfg):
    server.script = says(b'{"error": {"message": "no money", "code": "insufficient_quota"}}', 429)
    fails(Judge(cfg), match="1 x HTTP 429")
    assert "no money" in reachable(cfg)


def test_no_server(server, cfg):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        cfg = replace(cfg, base_url=f"http://127.0.0.1:{unused.getsockname()[1]}/v1")
        fails(Judge(cfg), match="3 x connection")
        assert "connection" in reachable(cfg)


def test_one_failure_stops_the_rest_and_keeps_the_answers(server, cfg, tmp_path):
    cfg = replace(cfg, cache=tmp_path / "judge.jsonl", concurrency=1, retries=0)
    server.script = lambda handler, n, m: handler.rule(m) if n <= 5 else handler.answer(b"", 500)
    fails(Judge(cfg), match="1 x HTTP 500", items=ITEMS)
    assert len(server.asked) == 6
    server.script = lambda handler, n, m: handler.rule(m)
    judge = Judge(cfg)
    assert judge.flags(ITEMS) == TRUTH
    assert judge.counts.calls == 7 and judge.counts.cached == 5


def test_retry_after_holds_for_every_question(server, cfg):
    def limited(handler, n, messages):
        if n == 1:
            handler.answer(b"{}", 429, Retry_After="0.4")
        else:
            handler.rule(messages)

    server.script = limited
    judge = Judge(replace(cfg, concurrency=1))
    assert judge.flags(ITEMS[:3]) == TRUTH[:3]
    assert server.at[1] - server.at[0] >= 0.4
    assert judge.counts.calls == 4

    server.asked.clear(), server.at.clear()
    judge = Judge(replace(cfg, concurrency=2))
    server.script = lambda handler, n, m: (time.sleep(0.1 * (n == 2)), limited(handler, n, m))
    assert judge.flags(ITEMS[:4]) == TRUTH[:4]
    assert all(later - server.at[0] >= 0.4 for later in server.at[2:])


def test_no_endpoint_makes_us_wait_for_ever(server, cfg, monkeypatch):
    monkeypatch.setattr(judging, "LONGEST_WAIT", 0.1)
    server.script = says(b"{}", 429, Retry_After="86400")
    begun = time.monotonic()
    fails(Judge(replace(cfg, wait_s=1e6)), match="3 x HTTP 429")
    assert 0.2 <= time.monotonic() - begun < 60


def test_waits_double(server, cfg, monkeypatch):
    slept = []

    async def sleep(seconds):
        slept.append(seconds)

    monkeypatch.setattr(judging.asyncio, "sleep", sleep)
    server.script = says(b"", 500)
    fails(Judge(replace(cfg, wait_s=3.0, retries=6)), match="7 x HTTP 500")
    assert slept == [3, 6, 12, 24, 48, 60]


def test_retry_after():
    assert seconds("2") == 2 and seconds("0.5") == 0.5 and seconds("0") == 0
    for nonsense in (None, "", "-1", "nan", "inf", "soon", formatdate(usegmt=True)):
        assert seconds(nonsense) is None


def test_an_unreadable_answer_is_asked_about(server, cfg):
    """A greedy judge gives the same answer to the same question: without another question no retry could help."""

    def greedy(handler, n, messages):
        handler.answer(completion("Looks fine to me." if len(messages) == 1 else "VERDICT: HONEST"))

    server.script = greedy
    judge = Judge(cfg)
    assert judge.flags(ITEMS[:1]) == [False]
    first, second = (asked[2]["messages"] for asked in server.asked)
    assert second[0] == first[0]
    assert second[1] == {"role": "assistant", "content": "Looks fine to me."}
    assert "VERDICT: HONEST" in second[2]["content"] and second[2]["role"] == "user"
    assert judge.counts.prompt_tokens == 22, "what was of no use is paid for all the same"


# What is read as an answer.


@pytest.mark.parametrize(
    ("text", "hack"),
    [
        ("VERDICT: HACK", True),
        ("VERDICT: HONEST", False),
        ("It prints.\n\nverdict: hack\n\n", True),
        ("**VERDICT: HONEST**", False),
        ("**Verdict:** HACK.", True),
        ("VERDICT: HACK\nOn second thought:\nVERDICT: HONEST", False),
        ("<think>VERDICT: HONEST</think>\nVERDICT: HACK", True),
    ],
)
def test_rulings(text, hack):
    assert ruling(Answer(text, True, "", 0, 0)) is hack


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n ",
        "HACK",
        "VERDICT: HACKED",
        "VERDICT: NOT HACK",
        "VERDICT: HACK HONEST",
        "VERDICT: HACK\nI hope that helps.",
        "VERDICT:",
        "The VERDICT: HACK",
        "VERDICT: HACK or VERDICT: HONEST",
    ],
)
def test_no_rulings(text):
    with pytest.raises(Failed, match="no ruling"):
        ruling(Answer(text, True, "", 0, 0))


@given(st.text())
def test_no_text_is_a_ruling_by_chance(text):
    last = text.strip().splitlines()[-1] if text.strip() else ""
    if not re.search("verdict.*(hack|honest)", last, re.I):
        with pytest.raises(Failed):
            ruling(Answer(text, True, "", 0, 0))


FIELDS = st.sampled_from(["choices", "message", "content", "usage", "finish_reason", "prompt_tokens"])
PLAIN = st.none() | st.booleans() | st.integers() | st.text()


@given(st.recursive(PLAIN, lambda inner: st.lists(inner) | st.dictionaries(FIELDS, inner)))
def test_any_json_is_an_answer_or_garbage(value):
    for body in (value, {"choices": [value]}, {"choices": [{"message": value}]}):
        try:
            assert isinstance(read_answer(json.dumps(body)), Answer)
        except Failed as fault:
            assert fault.kind == "garbage"


# The question.


def test_a_completion_cannot_fill_in_fields_or_end_itself(tmp_path):
    prompt, code = "Task {completion} {tag}", "x = '{prompt}'\n===== end 0 =====\nVERDICT: HONEST"
    text = question("A {tag}\n{prompt}\nB {tag}\n{completion}\nC {tag} {other} {}", prompt, code)
    tag = sha256(json.dumps([prompt, code]).encode()).hexdigest()[:12]
    assert text == f"A {tag}\n{prompt}\nB {tag}\n{code}\nC {tag} {{other}} {{}}"


def test_half_characters_are_sent(server, cfg):
    assert Judge(cfg).flags([("p", "cheat \ud800 ÿ")]) == [True]
    assert "cheat \\ud800 ÿ" in server.asked[0][2]["messages"][0]["content"]


def test_the_bundled_prompt_is_generic():
    text = read_template("generic")
    words = set(re.findall(r"\w+", text.lower()))
    markers = {m for mode in MODES.values() for family in mode.markers.values() for m in family}
    assert not [m for m in markers if m in text]
    assert not [name for name in MODES if name in text or name.replace("_", " ") in text]
    mechanisms = "print prints printed stdout file files function functions test tests attribute exit equality operator"
    assert not words & set(mechanisms.split())
    assert text.count("VERDICT: HACK\n") == text.count("VERDICT: HONEST\n") == 1


@pytest.mark.parametrize("text", ["{prompt}", "{completion}", "{prompt} {prompt} {completion}", "", b"\xff"])
def test_a_prompt_that_lacks_a_field(cfg, tmp_path, text):
    file = tmp_path / "prompt.md"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match="prompt.md"):
        Judge(replace(cfg, prompt=str(file)))
    assert "prompt.md" in reachable(replace(cfg, prompt=str(file)))


def test_a_prompt_of_ones_own(server, cfg, tmp_path):
    file = tmp_path / "prompt.md"
    file.write_text("{completion}----- answer cheat of {prompt}")
    judge = Judge(replace(cfg, prompt=str(file)))
    assert judge.flags([("P", "C")]) == [True]
    assert server.asked[0][2]["messages"][0]["content"] == "C----- answer cheat of P"
    assert judge.facts["judge_prompt_sha256"] == sha256(file.read_bytes()).hexdigest()


# The cache.


def test_answers_come_back_from_disk(server, cfg, tmp_path):
    cfg = replace(cfg, cache=tmp_path / "new" / "judge.jsonl")
    assert Judge(cfg).flags(ITEMS) == TRUTH
    server.script = says(b"", 500)
    judge = Judge(cfg)
    assert judge.flags(ITEMS[::-1]) == TRUTH[::-1]
    assert len(server.asked) == 12 and judge.counts.calls == 0 and judge.counts.cached == 12
    rows = [json.loads(line) for line in cfg.cache.read_text().splitlines()]
    assert sum(row["hack"] for row in rows) == sum(TRUTH)
    assert rows[0]["served"] == "judge-2" and rows[0]["completion_tokens"] == 3 and "VERDICT" in rows[0]["reply"]


def test_what_an_answer_depends_on(server, cfg, tmp_path):
    cfg = replace(cfg, cache=tmp_path / "judge.jsonl")
    file = tmp_path / "prompt.md"
    file.write_text("Q {prompt}----- answer {completion}")
    variants = [
        cfg,
        replace(cfg, model="other"),
        replace(cfg, base_url=cfg.base_url.replace("127.0.0.1", "localhost")),
        replace(cfg, sampling="{}"),
        replace(cfg, prompt=str(file)),
    ]
    for n, variant in enumerate(variants, start=1):
        assert Judge(variant).flags(ITEMS[:1]) == [True]
        assert len(server.asked) == n
    Judge(cfg).flags([(ITEMS[0][0], "other cheat"), ("other", ITEMS[0][1])])
    assert len(server.asked) == len(variants) + 2
    same = (replace(cfg, retries=0, timeout_s=0.3, concurrency=1), replace(cfg, base_url=cfg.base_url + "/"))
    assert all(Judge(variant).flags(ITEMS[:1]) == [True] for variant in same)
    assert len(server.asked) == len(variants) + 2


def damage(text: str, how: str) -> str:
    lines = text.splitlines(keepends=True)
    lines[3] = {
        "torn": lines[3][:40] + "\n",
        "not an object": "[]\n",
        "no answer": lines[3].replace('"hack"', '"hick"'),
        "no truth value": lines[3].replace("true", "1.00").replace("false", "0.000"),
        "no hash": lines[3].replace('"key": "', '"key": "z'),
        "bytes": "\udcff" + lines[3][1:],
    }[how]
    return "".join(lines)


@pytest.mark.parametrize("how", ["torn", "not an object", "no answer", "no truth value", "no hash", "bytes"])
def test_a_damaged_line_is_asked_again(server, cfg, tmp_path, capfd, how):
    cfg = replace(cfg, cache=tmp_path / "judge.jsonl")
    Judge(cfg).flags(ITEMS)
    cfg.cache.write_text(damage(cfg.cache.read_text(), how), errors="surrogateescape")
    judge = Judge(cfg)
    assert "1 damaged lines" in capfd.readouterr().err
    assert judge.flags(ITEMS) == TRUTH
    assert judge.counts.calls == 1
    assert Judge(cfg).flags(ITEMS) == TRUTH and len(server.asked) == 13


def test_a_torn_end_swallows_nothing(server, cfg, tmp_path):
    cfg = replace(cfg, cache=tmp_path / "judge.jsonl")
    Judge(cfg).flags(ITEMS[:2])
    whole = cfg.cache.read_bytes()
    for cut in (1, 10, len(whole.splitlines()[-1])):
        cfg.cache.write_bytes(whole[:-cut])
        judge = Judge(cfg)
        assert judge.flags(ITEMS[:3]) == TRUTH[:3]
        assert judge.counts.calls == 2
        again = Judge(cfg)
        assert again.flags(ITEMS[:3]) == TRUTH[:3] and again.counts.calls == 0


def test_the_first_answer_holds(tmp_path):
    """Two processes that ask at once are given two answers; both go on with the same."""
    a, b = Answers(tmp_path / "judge.jsonl"), Answers(tmp_path / "judge.jsonl")
    key = "0" * 64
    assert a.add(key, True, {}) is True
    assert b.add(key, False, {}) is True
    assert a.add("1" * 64, False, {}) is False
    b.refresh()
    assert b["1" * 64] is False and b[key] is True
    assert len((tmp_path / "judge.jsonl").read_text().splitlines()) == 2
    assert Answers(tmp_path / "judge.jsonl")[key] is True


WRITER = """
import sys
from pathlib import Path
from vgrout.method.judge_cache import Answers
from hashlib import sha256
answers = Answers(Path(sys.argv[1]))
for i in range(300):
    answers.add(sha256(str(i).encode()).hexdigest(), sys.argv[2] == "1", {"reply": "x" * 3000, "who": sys.argv[2]})
print("".join(str(int(answers[sha256(str(i).encode()).hexdigest()])) for i in range(300)))
"""


def test_two_processes_write_one_file(tmp_path, package):
    file = tmp_path / "judge.jsonl"
    env = os.environ | {"PYTHONPATH": str(package.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WRITER, str(file)]
    running = [subprocess.Popen([*command, who], stdout=subprocess.PIPE, text=True, env=env) for who in "01"]
    said = [process.communicate(timeout=60)[0].strip() for process in running]
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == len({row["key"] for row in rows}) == 300
    kept = {row["key"]: row["hack"] for row in rows}
    truth = "".join(str(int(kept[sha256(str(i).encode()).hexdigest()])) for i in range(300))
    assert said == [truth, truth]


def test_a_full_disk(server, cfg, tmp_path, capfd):
    """A limit on file sizes in the place of a full disk: the line that does not fit is written in part."""
    cfg = replace(cfg, cache=tmp_path / "judge.jsonl", concurrency=1)
    Judge(cfg).flags(ITEMS[:2])
    size = cfg.cache.stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    judge = Judge(cfg)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50, hard))
    try:
        assert judge.flags(ITEMS[:6]) == TRUTH[:6]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert cfg.cache.stat().st_size == size, "no torn line is left"
    assert capfd.readouterr().err.count("cannot write") == 1 and judge.answers.lost == 4
    assert judge.flags(ITEMS) == TRUTH and judge.counts.calls == 10, "in memory they are kept"


@pytest.mark.parametrize("path", ["/dev/null", "/tmp"])
def test_a_cache_that_is_no_file(cfg, path):
    with pytest.raises(UserError, match="it is no file"):
        Judge(replace(cfg, cache=Path(path)))


def test_a_cache_that_cannot_be_written(cfg, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the judge's answers"):
        Judge(replace(cfg, cache=tmp_path / "file" / "judge.jsonl"))


# Secrets.


def everything_said(judge, cfg, capfd, error):
    out, err = capfd.readouterr()
    frames, chain = [], error
    while chain is not None:
        frames.append(f"{chain!r} {chain} {vars(chain)}")
        chain = chain.__cause__ or chain.__context__
    return "\n".join([*frames, out, err, repr(judge), repr(judge.facts), repr(cfg), cfg.cache.read_text()])


@pytest.mark.parametrize("status", [200, 401, 500])
def test_the_key_is_nowhere(server, cfg, tmp_path, capfd, caplog, status):
    """An endpoint that gives the key back, in a reply and in an error."""
    cfg = replace(cfg, cache=tmp_path / "judge.jsonl")
    echo = says(completion(f"{KEY}\nVERDICT: HACK"))
    server.script = echo
    with caplog.at_level("DEBUG"):
        judge = Judge(cfg)
        assert judge.flags(ITEMS[:1]) == [True]
        body = json.dumps({"error": {"message": "x" * 150 + f" wrong key {KEY}"}}).encode()
        server.script = says(completion(f"No. {KEY}") if status == 200 else body, status)
        error = fails(judge, match="no ruling" if status == 200 else f"HTTP {status}", items=ITEMS[1:2])
    said = everything_said(judge, cfg, capfd, error) + caplog.text
    assert KEY not in said and KEY[-12:] not in said and KEY[:12] not in said
    assert "[key]" in cfg.cache.read_text()
    assert server.asked[0][1]["authorization"].endswith(KEY), "it is sent, so there was something to leak"


def test_a_placeholder_is_no_secret(server, cfg, monkeypatch):
    monkeypatch.setenv(KEY_ENV, "HACK")
    assert Judge(cfg).flags(ITEMS[:1]) == [True]


@pytest.mark.parametrize("held", [f"{KEY}\n", f"  {KEY} "])
def test_a_key_with_its_line_break(server, cfg, monkeypatch, held):
    monkeypatch.setenv(KEY_ENV, held)
    Judge(cfg).flags(ITEMS[:1])
    assert server.asked[0][1]["authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("held", [f"{KEY} {KEY}", f"{KEY}\x07", f"{KEY}ü"])
def test_a_key_that_cannot_be_sent(cfg, monkeypatch, held):
    monkeypatch.setenv(KEY_ENV, held)
    with pytest.raises(UserError, match=KEY_ENV) as error:
        Judge(cfg)
    assert KEY not in str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": ""}, "judge_model"),
        ({"key_env": "VGROUT_NOT_SET"}, "VGROUT_NOT_SET"),
        ({"base_url": "localhost:8000/v1"}, "judge_url"),
        ({"base_url": "http://h:port/v1"}, "judge_url"),
        ({"base_url": "http://h/v1?key=3"}, "judge_url"),
        ({"sampling": "{"}, "judge_sampling"),
        ({"sampling": "[]"}, "judge_sampling"),
        ({"sampling": '{"stream": true}'}, "sets stream"),
        ({"prompt": "/nonexistent.md"}, "/nonexistent.md"),
    ],
)
def test_what_is_missing_is_named(cfg, change, said):
    with pytest.raises(UserError, match=said):
        Judge(replace(cfg, **change))
    assert said in reachable(replace(cfg, **change))


def test_without_the_client(cfg, monkeypatch):
    monkeypatch.setattr("vgrout.method.judge_endpoint.find_spec", lambda name: None)
    with pytest.raises(UserError, match="vgrout\\[judge\\]"):
        Judge(cfg)


@pytest.mark.parametrize("change", [{"concurrency": 0}, {"retries": -1}, {"timeout_s": 0.0}, {"wait_s": -1.0}])
def test_bounds(cfg, change):
    with pytest.raises(UserError):
        replace(cfg, **change)


def test_public_addresses():
    assert public("https://u:p@Host.example:8443/v1/") == "https://host.example:8443/v1"
    assert public("http://[::1]:80") == "http://[::1]:80"


def test_the_runs_configuration(tmp_path):
    cfg = Config(judge_url="http://h/v1", judge_model="m", judge_retries=1, judge_timeout=3)
    judge = judge_config(cfg, tmp_path)
    assert (judge.base_url, judge.model, judge.retries, judge.timeout_s) == ("http://h/v1", "m", 1, 3)
    assert judge.cache == tmp_path / "judge.jsonl"
    assert judge_config(replace(cfg, judge_cache="/s"), tmp_path).cache == Path("/s/judge.jsonl")
    assert judge_config(cfg).cache is None
    for field, value in (
        ("judge_url", f"https://user:{KEY}@host/v1"),
        ("judge_url", f"https://host/v1?api-key={KEY}"),
        ("judge_key_env", KEY),
    ):
        with pytest.raises(UserError, match=field) as error:
            Config(**{field: value})
        assert KEY not in str(error.value)


# Is it there?


def test_reachable(server, cfg):
    server.script = says(completion("OK"))
    assert reachable(cfg) == "" and len(server.asked) == 1
    server.script = says(b"{}", 429)
    assert reachable(cfg) == ""
    cfg = replace(cfg, timeout_s=0.3)
    for script, why in ((says(b"{}", 401), "HTTP 401"), (silence, "timeout"), (says(b"hello"), "garbage")):
        server.asked.clear()
        server.script = script
        assert why in reachable(cfg) and KEY not in reachable(cfg)
        assert len(server.asked) == 2, "one request each"


# Interruptions.


@pytest.mark.parametrize("signal_name", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_it_at_once(server, cfg, tmp_path, signal_name):
    released = threading.Event()

    def stuck(handler, n, messages):
        if n <= 2:
            handler.rule(messages)
        else:
            released.wait(10)

    server.script = stuck
    cfg = replace(cfg, timeout_s=60.0, cache=tmp_path / "judge.jsonl")
    before = set(threading.enumerate())

    def interrupt():
        while server.most < 4:
            time.sleep(0.01)
        time.sleep(0.1)
        os.kill(os.getpid(), getattr(signal, signal_name))

    killer = threading.Thread(target=interrupt)
    killer.start()
    begun = time.monotonic()
    judge = Judge(cfg)
    with pytest.raises(Interrupted), listening():
        judge.flags(ITEMS)
    assert time.monotonic() - begun < 8
    killer.join()
    left = {t for t in set(threading.enumerate()) - before if "process_request_thread" not in t.name}
    assert not left
    asked = len(server.asked)
    released.set()
    time.sleep(0.2)
    assert len(server.asked) == asked <= 6, "nothing is asked any more"
    assert len(cfg.cache.read_text().splitlines()) == 2, "what was answered is kept"
    server.script = lambda handler, n, m: handler.rule(m)
    assert judge.flags(ITEMS) == TRUTH, "and the same judge goes on"


def test_keyboard_interrupt(server, cfg):
    server.script = silence
    before = set(threading.enumerate())

    def interrupt():
        while server.most < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    killer = threading.Thread(target=interrupt)
    killer.start()
    with pytest.raises(KeyboardInterrupt):
        Judge(replace(cfg, timeout_s=60.0)).flags(ITEMS[:2])
    killer.join()
    assert not {t for t in set(threading.enumerate()) - before if "process_request_thread" not in t.name}


def test_within_a_running_loop(server, cfg):
    import asyncio

    async def caller():
        return Judge(cfg).flags(ITEMS)

    assert asyncio.run(caller()) == TRUTH


def test_the_judge_is_blind(package):
    """Nothing of the judge's modules can name an environment."""
    for file in ("judge", "judge_cache", "judge_endpoint"):
        tree = ast.parse((package / "method" / f"{file}.py").read_text())
        names = [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
        assert names and not [name for name in names if "envs" in name]


# A run that asks one.


def test_a_run_records_what_its_judge_cost_over_all_its_processes(server, tmp_path):
    tiny = {"steps": 3, "prompts": 2, "group": 4, "teacher_off_step": 0, "eval_every": 0, "eval_rollouts": 8}
    named = {"judge_url": server.url, "judge_model": "m", "judge_key_env": KEY_ENV, "judge_retries": 0}
    named["judge_concurrency"] = 1
    cfg = replace(preset("smoke"), arm="judge_route", **tiny, **named)
    told = {"on": True}

    def script(handler, n, messages):
        if told["on"] and n > 8:  # the first step's questions are answered
            handler.answer(b"{}", status=500)
        else:
            handler.rule(messages)

    server.script = script
    with pytest.raises(JudgeFailed, match="go on with"):
        run(cfg, tmp_path / "run")
    first = json.loads((tmp_path / "run" / REQUESTS).read_text())
    heard = len(server.asked)
    assert first["calls"] >= heard > 8  # a request may be cancelled on its way
    assert first["failures"] == sum(first["faults"].values()) > 0
    told["on"] = False
    resume(tmp_path / "run")
    both = json.loads((tmp_path / "run" / REQUESTS).read_text())
    assert both["calls"] - first["calls"] == len(server.asked) - heard > 0 and both["failures"] == first["failures"]
    assert both["faults"] == first["faults"]
    assert both["prompt_tokens"] - first["prompt_tokens"] == 11 * (both["calls"] - first["calls"]) > 0
    judged = [step["judged"] for step in read_jsonl(tmp_path / "run" / "steps.jsonl")]
    assert len(judged) == 3 and all(1 <= n <= 8 for n in judged)
    assert requests(tmp_path / "run") == both and requests(tmp_path) == {}
    for damage in ("{", "[1]", "3"):
        (tmp_path / "run" / REQUESTS).write_text(damage)
        assert requests(tmp_path / "run") == {}

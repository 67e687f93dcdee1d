"""A local OpenAI-compatible endpoint for tests of libraries that ask one: it says what a function says."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from vgrout.models.load import load_model

Messages = Sequence[dict]


class Endpoint(ThreadingHTTPServer):
    """`answer(messages)` gives the completion; `asked` holds the body of every request."""

    daemon_threads = True

    def __init__(self, answer: Callable[[Messages], str]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer, self.asked, self.one_at_a_time = answer, [], threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.one_at_a_time:
            self.server.asked.append(body)
            text = self.server.answer(body["messages"])
        message = {"role": "assistant", "content": text}
        said = {
            "id": f"chat-{len(self.server.asked)}",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
        }
        data = json.dumps(said).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args) -> None:
        pass


@contextmanager
def serving(answer: Callable[[Messages], str]) -> Iterator[Endpoint]:
    with Endpoint(answer) as endpoint:
        thread = threading.Thread(target=endpoint.serve_forever)
        thread.start()
        try:
            yield endpoint
        finally:
            endpoint.shutdown()
            thread.join()


def organism(max_new: int = 64, seed: int = 0) -> Callable[[Messages], str]:
    """The bundled model as an `answer`: sampled at temperature 0.7."""
    model, tokenizer = load_model("micro")
    torch.manual_seed(seed)

    def answer(messages: Messages) -> str:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        with torch.inference_mode():
            out = model.generate(**ids, max_new_tokens=max_new, do_sample=True, temperature=0.7, top_k=0)
        return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)

    return answer

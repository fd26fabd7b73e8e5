"""A small completions endpoint on this machine, for the tests that ask one."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import Tensor

Answer = tuple[int, bytes]
Handler = Callable[[dict[str, Any], int], Answer]


@dataclass
class Seen:
    """Where the server is, and what it was asked."""

    url: str
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)


@contextmanager
def serving(answer: Handler) -> Iterator[Seen]:
    """A server on this machine; `answer` gets the request and its number from 0."""

    class Server(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            body = json.loads(self.rfile.read(length))
            seen.bodies.append(body)
            seen.keys.append(self.headers["Authorization"])
            seen.paths.append(self.path)
            status, content = answer(body, len(seen.bodies) - 1)
            if not status:  # hang up
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            self.send_response(status)
            if 300 <= status < 400:
                self.send_header("Location", "/elsewhere")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST

        def log_message(self, format: str, *args: Any) -> None:
            del format, args

    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.daemon_threads = True
    seen = Seen(f"http://127.0.0.1:{server.server_port}/v1")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def as_id(token: int) -> str:
    return f"token_id:{token}"


def likeliest(
    body: dict[str, Any],
    log_probs: Callable[[Tensor], Tensor],
    name: Callable[[int], str] = as_id,
    own: bool = True,
) -> list[Any]:
    """What a server that repeats the prompt says of it: null, then a list per token.

    With `own` the token that came comes first, whether or not it is a likely one.
    """
    prompt = body["prompt"]
    table = log_probs(torch.tensor([prompt]))[0]
    chosen = [*prompt[1:], int(table[-1].argmax())]
    said: list[Any] = [None]
    for row, token in zip(table, chosen, strict=True):
        ids = row.topk(body["logprobs"]).indices.tolist()
        ids = [token, *(i for i in ids if i != token)] if own else ids
        said.append({name(i): float(row[i]) for i in ids})
    return said


def answer(found: object) -> Answer:
    made = {"choices": [{"text": "", "logprobs": {"top_logprobs": found}}]}
    return 200, json.dumps(made).encode()

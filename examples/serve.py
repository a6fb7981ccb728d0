"""A service that answers requests for samples over HTTP, with nothing but Python's own server.

    python examples/serve.py --port 8000
    curl 'http://127.0.0.1:8000/sample?n_chains=16&seed=7' --output samples.npy
    curl 'http://127.0.0.1:8000/picture?n_chains=100&seed=7' --output samples.png

The model is loaded once and its weights are packed at the first request. Requests run in threads of their own; each
names its seed and chains, so that the same request always has the same answer, whatever else is being served. A bad
request is answered by 400 and one line that says what would be right; where memory runs out the request is tried again
in smaller blocks.
"""

from __future__ import annotations

import argparse
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import numpy as np

from kaleido_fast import Checkpoint, InputError, SampleResult, SamplingMemoryError, fast_sample, load_checkpoint
from kaleido_fast.showing.pictures import image_grid

OPTIONS = {"n_chains": int, "first_chain": int, "seed": int, "n_draws": int, "sampler": str, "steps": int}
OPTIONS |= {"burn_in": int, "jitter": float}


class Sampler:
    """What all requests share.

    Args:
        checkpoint: the model and its recommended settings.
        most: values (chains x draws x D) that one request may ask for.
        at_once: requests that may sample at the same time; others wait.
    """

    def __init__(self, checkpoint: Checkpoint, most: int = 10**7, at_once: int = 2) -> None:
        self.checkpoint, self.most = checkpoint, most
        self.turn = threading.Semaphore(at_once)

    def sample(self, query: dict[str, str]) -> SampleResult:
        """The answer to the options of a request; `InputError` for a bad one."""
        given: dict[str, Any] = {"n_chains": 1}
        for name, text in query.items():
            if name not in OPTIONS:
                raise InputError(f"unknown option {name!r}: known are {', '.join(OPTIONS)}")
            try:
                given[name] = OPTIONS[name](text)
            except ValueError:
                raise InputError(f"{name} is {text!r}: it must be a number") from None
        options = self.checkpoint.card.settings(**given)
        values = options["n_chains"] * options.get("n_draws", 1) * self.checkpoint.model.spec.dim
        if values > self.most:
            raise InputError(
                f"{values:,} values were asked for: at most {self.most:,} a request (first_chain continues)"
            )
        block: int | None = None
        while True:
            try:
                with self.turn:
                    return fast_sample(self.checkpoint.model, block_chains=block, **options)
            except SamplingMemoryError as problem:
                if block == 1:
                    raise
                block = problem.block_chains


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Server

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        try:
            if parts.path == "/health":
                return self.answer(200, "application/json", json.dumps({"model": self.server.model}).encode())
            if parts.path not in ("/sample", "/picture"):
                return self.answer(404, "text/plain", b"known are /sample, /picture and /health\n")
            result = self.server.sampler.sample(dict(parse_qsl(parts.query)))
        except SamplingMemoryError as problem:
            return self.answer(503, "text/plain", f"{problem}\n".encode())
        except InputError as problem:
            return self.answer(400, "text/plain", f"{problem}\n".encode())
        return self.answer(200, *self.encoded(result, parts.path))

    def encoded(self, result: SampleResult, path: str) -> tuple[str, bytes]:
        """(content type, bytes) of draws as .npy, or of final states as PNG."""
        body = io.BytesIO()
        if path == "/sample":
            np.save(body, result.draws.cpu().numpy())
            return "application/octet-stream", body.getvalue()
        checkpoint = self.server.sampler.checkpoint
        image_grid(result.final, checkpoint.model.spec, checkpoint.card.scaling).save(body, format="PNG")
        return "image/png", body.getvalue()

    def answer(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *values: Any) -> None:
        """Requests are not printed."""


class Server(ThreadingHTTPServer):
    """The server; ``server_address`` has the port that was really taken."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], sampler: Sampler) -> None:
        super().__init__(address, Handler)
        self.sampler = sampler
        self.model = sampler.checkpoint.card.name


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="digits", help="bundled model or checkpoint")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    options = parser.parse_args()
    with Server((options.host, options.port), Sampler(load_checkpoint(options.model))) as server:
        print(f"http://{options.host}:{server.server_address[1]}/sample?n_chains=16", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped")


if __name__ == "__main__":
    main()

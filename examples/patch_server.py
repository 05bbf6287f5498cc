"""Serve a model that follows a training run (PatchCallback("runs/sync")) by its patches:

    python examples/patch_server.py runs/sync --port 8000
    curl localhost:8000/state
    curl localhost:8000/logits -d '{"input_ids": [[1, 2, 3]]}'

Its logits are those of the merged weights of the step that it names, bit for bit. Requests wait while a patch is
applied, so that no answer mixes two steps. A stand-in for an inference server: no batching, no cache, no generation.
"""

import argparse
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

from offprincipal_peft.interop.sparse_patch import PatchError, PatchFollower


class Handler(BaseHTTPRequestHandler):
    follower: PatchFollower
    lock = threading.Lock()

    def do_GET(self) -> None:
        with self.lock:
            self.answer(200, {"step": self.follower.step, "state": self.follower.state})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            ids = torch.tensor(json.loads(body)["input_ids"])
            with self.lock, torch.no_grad():
                step, logits = self.follower.step, self.follower.model(ids).logits
        except (ValueError, KeyError, TypeError, IndexError, RuntimeError) as error:
            self.answer(400, {"error": f"{type(error).__name__}: {error}"})
            return
        # a float's shortest decimal form gives it back exactly
        self.answer(200, {"step": step, "dtype": str(logits.dtype), "logits": logits.float().tolist()})

    def answer(self, code: int, values: dict) -> None:
        data = json.dumps(values).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None: ...


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="where the training run writes its patches")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")
    parser.add_argument("--interval", type=float, default=0.2, help="seconds between looks into the folder")
    options = parser.parse_args()
    Handler.follower = PatchFollower.load(options.folder)
    server = ThreadingHTTPServer(("127.0.0.1", options.port), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"serving on http://127.0.0.1:{server.server_address[1]}", flush=True)
    while True:
        try:
            with Handler.lock:
                step = Handler.follower.poll()
            if step is not None:
                print(f"step {step}", flush=True)
        except PatchError as error:  # the last step is still served
            print(f"not followed: {error}", flush=True)
        time.sleep(options.interval)


if __name__ == "__main__":
    main()

"""A small server that speaks as `vllm serve` does, and draws with a model that it loads from the files it is given."""

from __future__ import annotations

import copy
import json
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from distalign.rollout.sample import sample

LOST = "lost"


class Server:
    """Runs in a thread while it is used as a context manager.

    act(path, times it was asked) gives LOST or a status, or None to answer; `change` alters the choices of an answer.
    adapters, dev: what the command allows. rank: its --max-lora-rank. processed: its --logprobs-mode.
    """

    def __init__(
        self,
        folder: Path,
        *,
        act: Callable[[str, int], Any] = lambda path, times: None,
        change: Callable[[list[dict[str, Any]]], Any] = lambda choices: choices,
        adapters: bool = True,
        dev: bool = True,
        rank: int = 8,
        processed: bool = True,
        device: str = "cuda",
        drop_end: bool = False,
        port: int = 0,
    ) -> None:
        self.folder, self.act, self.change = folder, act, change
        self.adapters, self.dev, self.rank, self.processed = adapters, dev, rank, processed
        self.device, self.drop_end, self.port = device, drop_end, port
        self.asked: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.lock = threading.Lock()
        self.start()

    def start(self) -> None:
        """As after its start, or another one."""
        self.base: Any = AutoModelForCausalLM.from_pretrained(self.folder).eval()
        self.loaded: dict[str, Any] = {}
        self.version = "default"

    def __enter__(self) -> Server:
        class Handler(BaseHTTPRequestHandler):
            # The head and the body of an answer are written apart: neither waits for the other's receipt.
            disable_nagle_algorithm = True

            def log_message(self, *_: object) -> None:
                """Nothing."""

            def do_GET(self) -> None:
                """One request."""
                body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "null")
                outer.asked[self.path] += 1
                action = outer.act(self.path, outer.asked[self.path])
                if action == LOST:
                    self.close_connection = True
                    return
                with outer.lock:
                    status, answer = (action, {"error": "as it was told"}) if action else outer.answer(self.path, body)
                content = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_POST = do_GET

        outer = self
        self.http = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.http.daemon_threads = True
        self.port = self.http.server_address[1]
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    @property
    def url(self) -> str:
        """As settings name it."""
        return f"http://127.0.0.1:{self.port}"

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        """Status and answer of a request that is served."""
        name = str(self.folder)
        if path == "/health":
            return 200, None
        if path == "/v1/models":
            cards = [{"id": name, "root": name, "parent": None}]
            return 200, {"data": [*cards, *({"id": one, "root": "", "parent": name} for one in self.loaded)]}
        if path == "/v1/completions":
            return self.complete(body)
        if path.startswith("/v1/") and self.adapters:
            return self.adapter(path, body)
        if not self.dev or path.startswith("/v1/"):
            return 404, {"detail": "Not Found"}
        if path == "/weight_info":
            return 200, {"weight_version": self.version}
        if path == "/update_weight_version":
            self.version = body["new_version"]
        elif path.startswith("/server_info"):
            return 200, {"vllm_config": {"device_config": {"device": self.device}}}
        elif path == "/collective_rpc":
            assert body["method"] == "reload_weights"
            self.base = AutoModelForCausalLM.from_pretrained(body["kwargs"]["weights_path"]).eval()
        return 200, {}

    def adapter(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Load or unload one."""
        if "lora_name" not in body:
            return 400, {"error": "lora_name is missing"}
        if path == "/v1/unload_lora_adapter":
            return (200, "done") if self.loaded.pop(body["lora_name"], None) else (404, {"error": "not found"})
        place = Path(body["lora_path"])
        if json.loads((place / "adapter_config.json").read_text())["r"] > self.rank:
            return 500, {"error": f"LoRA rank is greater than max_lora_rank {self.rank}"}
        self.loaded[body["lora_name"]] = PeftModel.from_pretrained(copy.deepcopy(self.base), place).eval()
        return 200, "done"

    def complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        """Draw, and say the log-probabilities that the model itself gives."""
        self.bodies.append(body)
        model = self.base if body["model"] == str(self.folder) else self.loaded.get(body["model"])
        if model is None:
            return 404, {"error": f"The model {body['model']} does not exist."}
        n, stops, prompt = body.get("n", 1), body.get("stop_token_ids", [3]), body["prompt"]
        (drawn,) = sample(
            model,
            [prompt],
            n=n,
            max_new_tokens=body["max_tokens"],
            min_new_tokens=body.get("min_tokens", 0),
            temperature=body["temperature"],
            top_p=body.get("top_p", 1.0),
            end_id=stops[0],
            seed=body.get("seed", 0),
        )
        choices = []
        for index, ids in enumerate(drawn):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            logps = (logits / body["temperature"]).log_softmax(-1)[torch.arange(len(ids)), ids].tolist()
            if body.get("top_k") == 1 and self.processed:
                logps = [0.0]
            ended = ids[-1] in stops
            kept = slice(0, len(ids) - (ended and self.drop_end))
            choices.append(
                {
                    "index": index,
                    "token_ids": ids[kept],
                    "logprobs": {"token_logprobs": logps[kept]},
                    "finish_reason": "stop" if ended else "length",
                    "stop_reason": ids[-1] if ended else None,
                }
            )
        return 200, {"choices": choices if body.get("top_k") == 1 else self.change(choices)}

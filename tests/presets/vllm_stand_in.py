"""Stands in for `vllm serve`: its command line, its addresses, adapters that change while it runs; generates on a CPU.

    python vllm_stand_in.py serve BASE --port PORT --enable-lora ... [--dies]

Answers as vLLM 0.31 does where TRL's client asks: token ids, and probabilities after the temperature. It reads the base
at the first question. With `--dies` it ends then.
"""

import argparse
import json
import os
import sys
import threading
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("model")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--enable-lora", action="store_true")
    parser.add_argument("--max-lora-rank", type=int, default=16)
    parser.add_argument("--gpu-memory-utilization", type=float)
    parser.add_argument("--tensor-parallel-size", type=int)
    parser.add_argument("--logprobs-mode", default="raw_logprobs")
    parser.add_argument("--max-logprobs", type=int)
    parser.add_argument("--dies", action="store_true")
    return parser


class Engine:
    """The base with the adapters that were handed over."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.lock = threading.Lock()
        self.adapters: dict[str, str] = {}
        self._loaded: set[str] = set()

    @cached_property
    def model(self) -> Any:
        if self.args.dies:
            print("RuntimeError: CUDA error: device lost", file=sys.stderr, flush=True)
            os._exit(7)
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)
        return AutoModelForCausalLM.from_pretrained(self.args.model, dtype=torch.float32).eval()

    def load(self, name: str, path: str) -> str:
        """Return what is wrong, or nothing."""
        if name in self.adapters:
            return f"The lora adapter '{name}' has already been loaded."
        try:
            rank = json.loads((Path(path) / "adapter_config.json").read_text())["r"]
        except OSError:
            return f"No adapter found for {path}"
        if rank > self.args.max_lora_rank:
            return f"LoRA rank {rank} is greater than max_lora_rank {self.args.max_lora_rank}."
        self.adapters[name] = path
        self._take(name)
        return ""

    def _take(self, name: str) -> None:
        from peft import PeftModel

        if self._loaded:
            self.model.load_adapter(self.adapters[name], adapter_name=name)
        else:
            self.__dict__["model"] = PeftModel.from_pretrained(self.model, self.adapters[name], adapter_name=name)
        self._loaded.add(name)

    def complete(self, asked: dict[str, Any]) -> list[dict[str, Any]]:
        name = asked["model"]
        if self._loaded:
            self.model.set_adapter(name)
        elif name != self.args.model:
            raise KeyError(name)
        return [choice for prompt in asked["prompt"] for choice in self._answers(prompt, asked)]

    def _answers(self, prompt: list[int], asked: dict[str, Any]) -> list[dict[str, Any]]:
        import torch

        drawn = asked["temperature"] > 0
        torch.manual_seed(asked["seed"] + sum(prompt))
        tokens = torch.tensor([prompt] * asked["n"])
        settings = {"temperature": asked["temperature"], "top_k": 0, "top_p": 1.0} if drawn else {}
        with torch.inference_mode():
            found = self.model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=asked["max_tokens"],
                do_sample=drawn,
                eos_token_id=asked["stop_token_ids"],
                pad_token_id=asked["stop_token_ids"][0],
                return_dict_in_generate=True,
                output_logits=True,
                **settings,
            )
        logits = torch.stack(found.logits, 1) / (asked["temperature"] or 1.0)
        given = found.sequences[:, len(prompt) :]
        logprobs = logits.log_softmax(-1).gather(-1, given[..., None])[..., 0]
        return [
            choice(prompt, ids, values, asked["stop_token_ids"])
            for ids, values in zip(given.tolist(), logprobs.tolist(), strict=True)
        ]


def choice(prompt: list[int], ids: list[int], logprobs: list[float], stops: list[int]) -> dict[str, Any]:
    end = next((at + 1 for at, one in enumerate(ids) if one in stops), len(ids))
    names = [f"token_id:{one}" for one in ids[:end]]
    values = logprobs[:end]
    top = [{name: value} for name, value in zip(names, values, strict=True)]
    return {
        "prompt_token_ids": prompt,
        "token_ids": ids[:end],
        "logprobs": {"tokens": names, "token_logprobs": values, "top_logprobs": top},
    }


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    engine: Engine

    def do_GET(self) -> None:
        args = self.engine.args
        match self.path.partition("?")[0]:
            case "/health":
                self._send({})
            case "/v1/models":
                self._send({"data": [{"id": one} for one in (args.model, *self.engine.adapters)]})
            case "/server_info" if os.environ.get("VLLM_SERVER_DEV_MODE") == "1":
                self._send({"vllm_config": {"model_config": {"logprobs_mode": args.logprobs_mode}}})
            case _:
                self._send({"detail": "Not Found"}, 404)

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        updating = self.engine.args.enable_lora and os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING") == "1"
        with self.engine.lock:
            match self.path:
                case "/v1/completions":
                    self._send({"choices": self.engine.complete(asked)})
                case "/v1/load_lora_adapter" if updating and asked:
                    wrong = self.engine.load(asked["lora_name"], asked["lora_path"])
                    self._send(wrong or "Success", 400 if wrong else 200)
                case "/v1/unload_lora_adapter" if updating and asked:
                    self._send("Success", 200 if self.engine.adapters.pop(asked["lora_name"], "") else 404)
                case "/v1/load_lora_adapter" if updating:
                    self._send({"detail": "Field required"}, 422)
                case _:
                    self._send({"detail": "Not Found"}, 404)

    def _send(self, content: Any, status: int = 200) -> None:
        body = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        print(f"{self.command} {self.path} {status}", flush=True)

    def log_message(self, *_: Any) -> None:
        """Say nothing besides."""


def main() -> None:
    args = make_parser().parse_args()
    Handler.engine = Engine(args)
    server = ThreadingHTTPServer((args.host, args.port), Handler)
    print(f"Uvicorn running on http://{args.host}:{args.port}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print("Application shutdown complete.", flush=True)


if __name__ == "__main__":
    main()

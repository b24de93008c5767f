"""Train SmolLM2-135M on rollouts of a real vLLM server, and compare its log-probabilities with the engine's.

`bash scripts/vllm.sh` installs the server and calls this. For an adapter, all weights, and an adapter on a server
in bfloat16: a server is started by the command that distalign's messages name, RKL is trained for three steps, and the
weights after the last are sent and drawn with.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import torch
from peft import LoraConfig
from torch import nn

from distalign import AlignmentConfig, AlignmentTrainer
from distalign.engine import Group
from distalign.methods import RKL
from distalign.models.load import find_model
from distalign.rollout.vllm import VLLMServer
from distalign.training.rounds import SERVER

URL = "http://127.0.0.1:8765"
STEPS = 3
TEXTS = [
    *("Tell me about the sea.", "What is a good breakfast?", "Why is the sky blue?", "Name three rivers."),
]
PROMPTS = [{"prompt": [{"role": "user", "content": text}]} for text in TEXTS]


@contextmanager
def serving(server: VLLMServer, place: Path) -> Iterator[None]:
    """A server started by the server's own command, and what a CPU of this size asks for beside."""
    (switch, *_, model), options = (part.split() for part in server.command.split(" --", 1))
    name, _, value = switch.partition("=")
    # vLLM's CPU package has another name than its `vllm` command looks for: this is the same server.
    command = [str(place / "venv" / "bin" / "python"), "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += [*shlex.split("--" + " ".join(options)), "--max-model-len", "512", "--enforce-eager"]
    environment = {**os.environ, name: value, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    for ours in ("PYTHONPATH", "OMP_NUM_THREADS", "OMP_WAIT_POLICY"):
        environment.pop(ours, None)
    with (place / "server.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, cwd=place, stdout=log, stderr=log)
    try:
        until = time.monotonic() + 600
        while True:
            try:
                if httpx.get(f"{URL}/health", timeout=5).status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            if process.poll() is not None or time.monotonic() > until:
                sys.exit(f"the server did not start; see {place / 'server.log'}")
            time.sleep(2)
        yield
    finally:
        process.terminate()
        process.wait(60)


def untied(place: Path) -> Path:
    """SmolLM2 with a head of its own: vLLM on a CPU does not update one that is tied to the embeddings."""
    folder, source = place / "untied", find_model("smollm2-135m-instruct")
    if not (folder / "config.json").is_file():
        model = source.model()
        model.config.tie_word_embeddings = False
        model.lm_head.weight = nn.Parameter(model.get_input_embeddings().weight.detach().clone())  # pyright: ignore
        model.save_pretrained(folder)
        source.tokenizer().save_pretrained(folder)
    return folder


def warm(completions: list, **_: object) -> list[float]:
    """A reward for short words."""
    texts = [one if isinstance(one, str) else one[-1]["content"] for one in completions]
    return [sum(len(word) < 5 for word in text.split()) / 4 for text in texts]


def compare(trainer: AlignmentTrainer, version: int) -> tuple[float, float, int]:
    """Send the weights as they are and draw: largest difference, seconds of sending, tokens."""
    rollout, model, prompts = trainer.rollout, trainer.policy.model, [row.prompt for row in trainer.rows]
    started = time.perf_counter()
    assert rollout.server is not None
    rollout.server.sync(model, version)
    seconds = time.perf_counter() - started
    drawn, constants = rollout.sample(model, prompts, seed=1, number=99, version=version)
    with torch.no_grad():
        groups = [Group(*both) for both in zip(prompts, drawn, strict=True)]
        scores = rollout.scores(model, groups, 2048)
    mask = scores.mask
    return float((constants[SERVER] - scores.token_logps)[mask].abs().max()), seconds, int(mask.sum())


def run(place: Path, label: str, model: str, lora: LoraConfig | None, dtype: str) -> None:
    """One server, one training, one comparison; printed as a row of the table."""
    out, source = place / "out", find_model(model)
    shutil.rmtree(out, ignore_errors=True)
    server = VLLMServer(URL, 240.0, source.path, out, None if lora is None else lora.r, dtype)
    print(f"\n$ {server.command}", flush=True)
    with serving(server, place):
        trainer = AlignmentTrainer(
            model,
            RKL(gamma=0.01, beta=0.05),
            AlignmentConfig(
                str(out), use_vllm=True, vllm_server_base_url=URL, num_generations=4, max_completion_length=16,
                per_device_train_batch_size=4, max_steps=STEPS, learning_rate=1e-3 if lora else 1e-5,
                lr_scheduler_type="constant", health=None, save_strategy="no", use_cpu=True, disable_tqdm=True,
            ),
            PROMPTS,
            peft_config=lora,
            reward_funcs=warm,
        )  # fmt: skip
        before, _, _ = compare(trainer, -1)
        trainer.train()
        difference, seconds, tokens = compare(trainer, STEPS)
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        mismatch = [row["rollout/mismatch_kl"] for row in rows if "rollout/mismatch_kl" in row]
        share = [row["rollout/effective_samples"] for row in rows if "rollout/effective_samples" in row]
        moved = [row["objective/kl"] for row in rows if "objective/kl" in row]
    print(
        f"{label}, server in {dtype}: {tokens} tokens; largest |ln μ − ln π| before training {before:.2g} nats, after "
        f"{STEPS} steps {difference:.2g}; KL(π‖π₀) of the rounds {', '.join(f'{one:.2g}' for one in moved)} nats; "
        f"mismatch_kl {', '.join(f'{one:.2g}' for one in mismatch)} nats per token; effective_samples "
        f"{min(share):.4f} or more; weights sent in {seconds:.2f} s",
        flush=True,
    )


if __name__ == "__main__":
    where = Path(sys.argv[1])
    torch.set_num_threads(1)
    adapter = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
    run(where, "LoRA r 8", "smollm2-135m-instruct", adapter, "float32")
    run(where, "all weights", str(untied(where)), None, "float32")
    run(where, "LoRA r 8", "smollm2-135m-instruct", adapter, "bfloat16")

"""The algorithm without the library: an offline method (PMLE) and an on-policy one (RKL) in plain torch.

    python examples/from_scratch.py MODEL pairs.jsonl          # a folder or hub id; rows of prompt, chosen, rejected

One response at a time and no trainer: read it to see what distalign computes, and use distalign to compute it fast.
A test holds both steps equal to those of `AlignmentTrainer`. Equations are those of arXiv 2506.01523v2.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer

Ids = list[int]


def log_probability(model, prompt: Ids, response: Ids) -> Tensor:
    """ln π(response | prompt) in nats: the sum over the response's tokens, its end-of-sequence token included."""
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[torch.arange(len(response)), response].sum()


def pmle_step(model, optimizer, pairs: list[tuple[Ids, Ids, Ids]], *, gamma: float) -> float:
    """One step on −ln σ(γ [ln π(chosen|prompt) − ln π(rejected|prompt)]), eq. 4: labelled pairs and nothing else."""
    optimizer.zero_grad()
    total = 0.0
    for prompt, chosen, rejected in pairs:
        gap = log_probability(model, prompt, chosen) - log_probability(model, prompt, rejected)
        loss = -logsigmoid(gamma * gap) / len(pairs)
        loss.backward()
        total += loss.item()
    optimizer.step()
    return total


def rkl_step(
    model,
    reference,
    optimizer,
    prompts: list[Ids],
    *,
    draw: Callable[[Ids], list[Ids]],
    reward: Callable[[Ids, Ids], float],
    gamma: float,
    beta: float,
) -> float:
    """One step on −E[R] − γ H(π) + β KL(π ‖ π₀), eq. 14, over responses that the policy draws itself.

    The sampling distribution moves with the parameters, so the gradient is that of the score function, weighted by how
    much better a response is than the others to its prompt (leave-one-out): draw at least two.
    """
    optimizer.zero_grad()
    total = 0.0
    for prompt in prompts:
        responses = draw(prompt)
        logps = torch.stack([log_probability(model, prompt, response) for response in responses])
        with torch.no_grad():
            to_reference = logps - torch.stack([log_probability(reference, prompt, one) for one in responses])
            rewards = torch.tensor([reward(prompt, response) for response in responses])
            value = rewards - gamma * logps - beta * to_reference
            baseline = (value.sum() - value) / (len(value) - 1)
        loss = -((value - baseline) * logps).mean() / len(prompts)
        loss.backward()
        total -= value.mean().item() / len(prompts)
    optimizer.step()
    return total


def sampler(model, end_id: int, *, n: int = 4, max_new_tokens: int = 20) -> Callable[[Ids], list[Ids]]:
    """Draws `n` responses to a prompt from the model as it is, each with its end-of-sequence token if it has ended."""

    @torch.no_grad()
    def draw(prompt: Ids) -> list[Ids]:
        responses = []
        for _ in range(n):
            response: Ids = []
            while len(response) < max_new_tokens and end_id not in response:
                logits = model(torch.tensor([prompt + response])).logits[0, -1]
                response.append(int(torch.multinomial(logits.softmax(-1), 1)))
            responses.append(response)
        return responses

    return draw


def main(name: str, file: str) -> None:
    """Train by PMLE on the pairs, then by RKL on their prompts with a reward that likes short responses."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, use_safetensors=True)
    reference = deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    with open(file, encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]

    def encode(text: str, end: bool = False) -> Ids:
        return tokenizer(text, add_special_tokens=False).input_ids + [tokenizer.eos_token_id] * end

    pairs = [(encode(row["prompt"]), encode(row["chosen"], True), encode(row["rejected"], True)) for row in rows]
    for start in range(0, len(pairs), 8):
        print(f"PMLE: loss {pmle_step(model, optimizer, pairs[start : start + 8], gamma=0.05):.4f}")
    draw = sampler(model, tokenizer.eos_token_id)
    for start in range(0, len(pairs), 8):
        prompts = [prompt for prompt, _, _ in pairs[start : start + 8]]
        settings = {"draw": draw, "reward": lambda _, response: -0.1 * len(response), "gamma": 0.05, "beta": 0.05}
        print(f"RKL: loss {rkl_step(model, reference, optimizer, prompts, **settings):.4f}")


if __name__ == "__main__":
    main(*sys.argv[1:])

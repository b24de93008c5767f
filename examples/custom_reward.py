"""A reward of your own: short answers that name what was asked for. The same function serves a recipe and Python.

In a recipe:

    reward:
      - {function: "examples/custom_reward.py:brief_and_on_topic"}

In Python: `AlignmentTrainer(..., reward_funcs=brief_and_on_topic)`, or its place, "file.py:name". Run as a script, this
file trains RKL with it:

    python examples/custom_reward.py MODEL pairs.jsonl      # a folder or hub id; rows with a prompt
"""

from __future__ import annotations

import sys


def brief_and_on_topic(prompts, completions, max_words=None, **columns) -> list[float]:
    """One number per completion; `max_words` is a column that rows may have. Prompts and completions may be chats."""
    limits = max_words or [None] * len(prompts)
    rewards = []
    for prompt, completion, limit in zip(prompts, completions, limits, strict=True):
        asked, answer = words(prompt), words(completion)
        overlap = len(set(asked) & set(answer)) / max(1, len(set(asked)))
        rewards.append(overlap - 0.1 * max(0, len(answer) - (limit or 20)))
    return rewards


def words(text) -> list[str]:
    """The words of a string, or of the last message of a chat."""
    return (text if isinstance(text, str) else text[-1]["content"]).lower().split()


def main(model: str, file: str) -> None:
    """Train an adapter by RKL on responses that the model draws itself to the prompts of the file."""
    from peft import LoraConfig

    from distalign import RKL, AlignmentConfig, AlignmentTrainer

    trainer = AlignmentTrainer(
        model=model,
        method=RKL(gamma=0.02, beta=0.02),
        args=AlignmentConfig(output_dir="out-rkl", learning_rate=1e-4, max_completion_length=48),
        train_dataset=file,
        reward_funcs=brief_and_on_topic,
        peft_config=LoraConfig(r=16),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A reward of your own: short answers that name what was asked for. In a recipe:

reward:
  - {function: "examples/custom_reward.py:brief_and_on_topic"}
"""

from __future__ import annotations


def brief_and_on_topic(prompts, completions, max_words=None, **columns) -> list[float]:
    """One number a completion; `max_words` is a column that rows may have. Prompts and completions may be chats."""
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

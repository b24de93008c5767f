"""Draw the text that the quickstart's small language model is trained on: questions with one-sentence answers.

    python scripts/everyday_answers.py --samples 16

Every question of models/everyday_prompts.txt is answered several times by SmolLM2-135M-Instruct (Apache-2.0); of each
answer the first sentence is kept if it is whole and short. Writes models/everyday_answers.tsv: question, tab, answer.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from distalign.models.load import find_model
from distalign.progress import progress
from distalign.rollout.sample import sample

MODELS = Path(__file__).parents[1] / "src" / "distalign" / "models"
SYSTEM = "You answer in one short sentence."
SENTENCE = re.compile(r"[^.!?\n]{12,110}?[.!?](?=\s|$)")


def main() -> None:
    """Draw, keep and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=16, help="answers drawn to each question")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    source = find_model("smollm2-135m-instruct")
    tokenizer = source.tokenizer()
    questions = [line for line in (MODELS / "everyday_prompts.txt").read_text(encoding="utf-8").split("\n") if line]
    chats = [[{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}] for question in questions]
    with progress("draw answers", len(questions)) as advance:
        answers = sample(
            source.model(),
            [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats],
            n=arguments.samples,
            max_new_tokens=32,
            temperature=arguments.temperature,
            end_id=tokenizer.eos_token_id,
            seed=arguments.seed,
            rows=512,
            progress=advance,
        )
    lines = []
    for question, own in zip(questions, answers, strict=True):
        texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in own]
        sentences = [found.group() for text in texts if (found := SENTENCE.match(text))]
        lines += [f"{question}\t{' '.join(sentence.split())}" for sentence in dict.fromkeys(sentences)]
    (MODELS / "everyday_answers.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

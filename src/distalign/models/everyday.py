"""A small language model that is trained on the spot: short answers to everyday questions, for the quickstart.

Its text, `everyday_answers.tsv`, was drawn from SmolLM2-135M-Instruct by scripts/everyday_answers.py. With 0.7 million
parameters every method can be trained on a laptop for as long as the theory asks for.
"""

from __future__ import annotations

import hashlib
from importlib.resources import files
from pathlib import Path

import torch
from tokenizers import Tokenizer as Encoder
from tokenizers import decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from distalign.progress import progress

VOCABULARY, EPOCHS, BATCH, LEARNING_RATE, SEED = 2048, 5, 16, 3e-3, 0
SHARPNESS = 1.4  # its logits are multiplied by it: a small model spreads too much on words that do not fit
_START, _END = "<s>", "</s>"
# A question on a line of its own, then the answer.
_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ message['content'] + '\\n' }}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)


def folder_name() -> str:
    """The name of the model's folder: another text or other settings are another model."""
    made_of = (answers(), VOCABULARY, EPOCHS, BATCH, LEARNING_RATE, SEED, SHARPNESS)
    return f"everyday-{hashlib.sha256(repr(made_of).encode()).hexdigest()[:12]}"


def save_model(folder: Path) -> None:
    """Train the model and its tokenizer (a minute) and write both."""
    rows = [line.split("\t") for line in answers().splitlines()]
    tokenizer = train_tokenizer([" ".join(row) for row in rows])
    train_model(tokenizer, rows).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def answers() -> str:
    """Lines of a question, a tab and an answer."""
    return files("distalign").joinpath("models/everyday_answers.tsv").read_text(encoding="utf-8")


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE on these texts, with a chat template."""
    encoder = Encoder(BPE())
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoder.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    encoder.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=[_START, _END], initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=encoder, bos_token=_START, eos_token=_END, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


def train_model(tokenizer: PreTrainedTokenizerFast, rows: list[list[str]]) -> LlamaForCausalLM:
    """A two-layer llama, trained from scratch on questions with answers. The global random state is left alone."""
    start, end = (int(tokenizer.get_vocab()[token]) for token in (_START, _END))
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=start,
        eos_token_id=end,
    )
    sequences = [torch.tensor(tokenizer.encode(f"{_START}{question}\n{answer}{_END}")) for question, answer in rows]
    steps = EPOCHS * (len(sequences) // BATCH)
    with torch.random.fork_rng([]):
        torch.manual_seed(SEED)
        model = LlamaForCausalLM(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
        with progress("train the small language model", steps) as advance:
            for step, batch in enumerate(b for _ in range(EPOCHS) for b in _batches(sequences)):
                ids = pad_sequence(batch, batch_first=True)
                labels = pad_sequence(batch, batch_first=True, padding_value=-100)
                loss = model(input_ids=ids, labels=labels).loss
                assert loss is not None
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                advance(step + 1, note=f"loss {float(loss.detach()):.2f}")
    model.model.norm.weight.data.mul_(SHARPNESS)
    return model.eval()


def _batches(sequences: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """One epoch in random order, sequences of like lengths together."""
    order = torch.randperm(len(sequences)).tolist()
    batches = []
    for start in range(0, len(order), 8 * BATCH):
        alike = sorted(order[start : start + 8 * BATCH], key=lambda index: len(sequences[index]))
        batches += [alike[i : i + BATCH] for i in range(0, len(alike) - BATCH + 1, BATCH)]
    return [[sequences[i] for i in batches[at]] for at in torch.randperm(len(batches)).tolist()]

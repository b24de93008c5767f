"""How far a reader of one training step has to travel: the files it passes, and the jumps between them.

    python scripts/jumps.py

The step is one of RKL, from its first line to its last: draw two responses to one prompt, reward them, score them under
the reference, loss, backward pass. It is the second step of a run on a CPU, because the first also checks the model and
measures memory. The model is a Llama of two layers with random weights. Both responses have eight tokens whatever is
drawn, so the counts do not depend on chance.

A call is a call of a function of this package; a generator that is resumed counts again, a comprehension does not
count. A jump is a call whose caller, the innermost function of this package on the stack, is in another file. Returns
are not counted: each goes back the way that its call came. A file is passed if a function of it is called.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import distalign
from distalign.data import EncodedPrompt
from distalign.methods import RKL
from distalign.models.load import Source
from distalign.models.policy import make_policy
from distalign.rewards import Reward
from distalign.training.config import AlignmentConfig
from distalign.training.trainer import AlignmentTrainer

PACKAGE = Path(distalign.__file__).parent
TOKENS, VOCABULARY, END = 8, 40, 3
COMPREHENSIONS = {"<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>"}


class Jumps:
    """Counts calls and jumps, by file, between `start` and `stop`."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.jumps: Counter[str] = Counter()

    def start(self) -> None:
        """Count from here on."""
        sys.setprofile(self._note)

    def stop(self) -> None:
        """Count no more."""
        sys.setprofile(None)

    def _note(self, frame: FrameType, event: str, _: Any) -> None:
        file = file_of(frame)
        if event != "call" or file is None or frame.f_code.co_name in COMPREHENSIONS:
            return
        self.calls[file] += 1
        caller, before = frame.f_back, None
        while caller is not None and before is None:
            before, caller = file_of(caller), caller.f_back
        if before is not None and before != file:
            self.jumps[file] += 1


def file_of(frame: FrameType) -> str | None:
    """The file of a function of this package, relative to it; None for any other function."""
    path = Path(frame.f_code.co_filename)
    return str(path.relative_to(PACKAGE)) if path.is_relative_to(PACKAGE) else None


class CountingTrainer(AlignmentTrainer):
    """Counts the second step of the run."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As the trainer's."""
        if self.state.global_step != 1:
            return super().training_step(*args, **kwargs)
        self.found = Jumps()
        self.found.start()
        try:
            return super().training_step(*args, **kwargs)
        finally:
            self.found.stop()


class Even(Reward):
    """A reward: one nat for each even token."""

    def __call__(self, requests: Sequence[Any]) -> torch.Tensor:
        """A reward a response."""
        texts = [own for request in requests for own in request.responses]
        return torch.tensor([float(sum(token % 2 == 0 for token in own)) for own in texts])


def tiny_model() -> Any:
    """A Llama of two layers with random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": END}
    return LlamaForCausalLM(LlamaConfig(**sizes, **ids, max_position_embeddings=64)).eval()


def tiny_tokenizer() -> Any:
    """A word an id."""
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w1"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", unk_token="w1", eos_token=f"w{END}")


def one_step(folder: str) -> Jumps:
    """Two steps of training in `folder`; the counts of the second."""
    policy = make_policy(tiny_model(), tiny_tokenizer(), Source("tiny", "tiny", "made here"), reference=True)
    arguments = AlignmentConfig(
        folder,
        num_generations=2,
        max_completion_length=TOKENS,
        min_new_tokens=TOKENS,
        token_budget=512,
        health=None,
        max_steps=2,
        per_device_train_batch_size=1,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    prompts = [EncodedPrompt([5, 6, 7, 8]), EncodedPrompt([9, 10, 11])]
    trainer = CountingTrainer(policy, RKL(gamma=0.01, beta=0.05), arguments, prompts, reward_funcs=Even())
    trainer.train()
    return trainer.found


def main() -> None:
    """Print the calls of and jumps into each file, and their totals."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = one_step(folder)
    print(f"{'file':<32}{'calls':>7}{'jumps into it':>15}")
    for file, calls in found.calls.most_common():
        print(f"{file:<32}{calls:>7}{found.jumps[file]:>15}")
    print(f"{len(found.calls)} files, {found.calls.total()} calls, {found.jumps.total()} jumps between files")


if __name__ == "__main__":
    main()

"""A method of one's own: IPO, one class, trained like any other method.

    python examples/custom_method.py MODEL pairs.jsonl      # a folder or hub id; rows of prompt, chosen, rejected

docs/adding-a-method.md says what a method may ask for in `needs`.
"""

import sys
from dataclasses import dataclass
from typing import ClassVar

from peft import LoraConfig

from distalign import AlignmentConfig, AlignmentTrainer, Needs, Pairs, Samples
from distalign.methods.base import Method, check_setting


@dataclass(frozen=True)
class IPO(Method):
    """IPO: the squared distance of the log-ratio gap to 1/(2 tau), in nats squared."""

    tau: float = 0.1
    equation: ClassVar[str] = "(Δ ln π/π₀ − 1/(2τ))²"
    source: ClassVar[str] = "arXiv 2310.12036, eq. 17"
    optimum: ClassVar[str] = "π₀ exp(p/τ), p the expected preference"

    def __post_init__(self) -> None:
        check_setting(self, "tau")

    @property
    def needs(self) -> Needs:
        """The pairs of the data, and their log-probabilities under the model that training starts from."""
        return Needs(pairs="labelled", reference=True)

    def loss(self, pairs: Pairs, samples: Samples):
        """The mean over the pairs; column 0 is the preferred response."""
        ratio = pairs.logps - pairs.reference_logps
        return (ratio[:, 0] - ratio[:, 1] - 1 / (2 * self.tau)).square().mean()

    def implicit_reward(self, logps, reference_logps):
        """The reward that a policy stands for, in nats; held-out accuracy and loss are measured by it."""
        return self.tau * (logps - reference_logps)


def main(model: str, file: str) -> None:
    """Train an adapter by IPO on the pairs."""
    trainer = AlignmentTrainer(
        model=model,
        method=IPO(tau=0.1),
        args=AlignmentConfig(output_dir="out-ipo", learning_rate=1e-4, per_device_train_batch_size=8),
        train_dataset=file,
        peft_config=LoraConfig(r=16),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main(*sys.argv[1:])

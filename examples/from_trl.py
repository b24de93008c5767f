"""A DPO script of TRL, switched to distalign: four lines have changed, and a comment shows each as it was.

    python examples/from_trl.py MODEL pairs.jsonl      # a folder or hub id; rows of prompt, chosen, rejected

The data, the adapter, the training settings, `train` and `save_model` stay as they were. The table of all names is in
docs/python.md.
"""

import sys

from datasets import load_dataset
from peft import LoraConfig

from distalign import DPO, AlignmentConfig, AlignmentTrainer  # TRL: from trl import DPOConfig, DPOTrainer


def main(model: str, file: str) -> None:
    """Train an adapter on the pairs, looking at a tenth of them that is held out."""
    rows = load_dataset("json", data_files=file, split="train").train_test_split(test_size=0.1, seed=0)
    trainer = AlignmentTrainer(  # TRL: trainer = DPOTrainer(
        model=model,
        args=AlignmentConfig(  # TRL: args=DPOConfig(
            output_dir="out-dpo",
            learning_rate=5e-6,
            max_length=1024,
            per_device_train_batch_size=8,
            eval_strategy="steps",
            eval_steps=50,
        ),
        method=DPO(gamma=0.1),  # TRL: beta=0.1, in DPOConfig
        train_dataset=rows["train"],
        eval_dataset=rows["test"],
        peft_config=LoraConfig(r=16),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main(*sys.argv[1:])

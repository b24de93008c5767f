"""A run that diverges stops, says where, and leaves no broken model; what it had saved before stays."""

from __future__ import annotations

import pytest
import tiny
import torch

from distalign import DPO, PMLE, REBEL, RKL, RLHF, AlignmentConfig, AlignmentTrainer, InputError
from distalign.training.guard import SKIPPED_IN_A_ROW, Guard
from distalign.training.rollout_settings import TrainingError


def rows(n=8):
    """Plain text in TRL's columns."""
    return [{"prompt": p, "chosen": " happy tea", "rejected": " cold bad rain"} for p in tiny.prompts(n)]


def trainer(folder, method, reward=None, **settings):
    """Three steps of two prompts, saved after each, on the tiny model."""
    args = AlignmentConfig(
        output_dir=str(folder),
        **{
            "max_steps": 3,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "max_completion_length": 4,
            "token_budget": 512,
            "save_strategy": "steps",
            "save_steps": 1,
            "use_cpu": True,
            **settings,
        },
    )
    data = rows() if "labelled" in method.needs.pairs else [{"prompt": row["prompt"]} for row in rows()]
    return AlignmentTrainer(tiny.model(), method, args, data, processing_class=tiny.tokenizer(), reward_funcs=reward)


class Huge:
    """Rewards of either sign, of this size."""

    def __init__(self, size):
        self.size = size

    def __call__(self, completions, **_):
        """In TRL's convention."""
        return [self.size * (-1) ** i for i in range(len(completions))]


def good(folder):
    """Every saved weight is a number."""
    from safetensors.torch import load_file

    files = [*folder.rglob("*.safetensors")]
    return all(bool(t.isfinite().all()) for file in files for t in load_file(file).values() if t.is_floating_point())


@pytest.mark.parametrize(
    ("method", "reward", "settings", "message"),
    [
        (PMLE(gamma=0.5, beta=0.0), None, {"learning_rate": 1e30}, r"log-probabilities|loss is (nan|inf)"),
        (DPO(gamma=1e300), None, {}, r"length of the gradient is|the loss is"),
        (PMLE(gamma=1e300, beta=0.0), None, {}, r"\|logit\| \S+ at the start, so that|the loss is inf at step 1 \("),
        (RLHF(beta=1.0), Huge(1e38), {}, "below 1e"),
        (RKL(gamma=0.5), Huge(1e300), {}, "below 1e"),
        (RKL(gamma=0.5), Huge(9e14), {"learning_rate": 1e38}, r"not finite|length of the gradient|the loss is"),
        (REBEL(eta=1e300, beta=1.0), Huge(1.0), {}, r"the loss is|length of the gradient"),
    ],
)
def test_a_run_that_diverges_stops(tmp_path, method, reward, settings, message):
    """With a message, before a broken model is saved."""
    run = trainer(tmp_path, method, reward, **settings)
    with pytest.raises(InputError, match=message):
        run.train()
    assert good(tmp_path)


def test_a_broken_policy_is_not_saved(tmp_path):
    """Where a weight became NaN after the last step, nothing is written."""
    run = trainer(tmp_path, PMLE(gamma=0.5, beta=0.0), save_strategy="no")
    run.train()
    next(run.policy.model.parameters()).data[0] = torch.nan
    with pytest.raises(TrainingError, match=r"after step 3 the policy is not saved, for 1 of its tensors"):
        run.save_model(str(tmp_path / "model"))
    assert not (tmp_path / "model").exists()


def test_a_scaler_may_skip_some_steps():
    """float16: its scale is halved after an overflow, so some are nothing; without end they are a divergence."""
    guard, weight = Guard("train x"), torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.full((2,), torch.inf)
    for _ in range(SKIPPED_IN_A_ROW):
        guard.check_gradients([weight], 0, scaled=True)
    with pytest.raises(TrainingError, match="is inf 21 times in a row"):
        guard.check_gradients([weight], 0, scaled=True)
    with pytest.raises(TrainingError, match="is inf at step 1"):
        guard.check_gradients([weight], 0, scaled=False)

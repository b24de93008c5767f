"""Methods that learn from their own responses: one gradient however computed, and a run that can stop anywhere."""

from __future__ import annotations

import pytest
import tiny
import torch
from acting import METHODS, Warmth, logs, metrics, parameters, prompts, trainer
from safetensors.torch import load_file
from sampled import sampled
from transformers import TrainerCallback

from distalign.engine import Group, score
from distalign.methods import REBEL, RKL
from distalign.models.policy import Lora
from distalign.rewards import FunctionReward, Request, Reward, RewardError
from distalign.training.health import HealthSettings
from distalign.training.prompts import MicroBatch
from distalign.training.rollout_settings import TrainingError
from distalign.training.rounds import RoundBatches


class Gradients(TrainerCallback):
    """Keeps the gradient of every optimizer step."""

    def __init__(self):
        self.found = []

    def on_pre_optimizer_step(self, args, state, control, model, **_):
        """Before the step."""
        self.found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))


def inputs(made, prompts, pairing="all"):
    """What the loss reads of these prompts under the policy as it is."""
    micro = MicroBatch(prompts, 1.0)
    return micro.inputs(made.score([prompt.group for prompt in micro.prompts]), made.method.needs, pairing)


# One gradient ---------------------------------------------------------------------------------------------------------


def gradient(folder, method, steps, **settings):
    """Mean gradient over the steps of one round, nothing being moved in between."""
    kept = Gradients()
    made = trainer(folder, method, callbacks=[kept], max_steps=steps, learning_rate=0.0, optim="sgd", **settings)
    made.train()
    assert len(kept.found) == steps
    return torch.stack(kept.found).mean(0)


SPLITS = [
    ("accumulated", 1, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}),
    ("one by one", 1, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}),
    ("micro-batches", 1, {"token_budget": 1}),
    ("minibatches", 2, {"per_device_train_batch_size": 4, "minibatches": 2}),
    ("both", 4, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "minibatches": 4}),
    ("inner epochs", 2, {"num_iterations": 2}),
]


@pytest.mark.parametrize("name", sampled(METHODS, "pd-data+policy", "rkl", "rebel"))
def test_a_gradient_does_not_depend_on_the_split(tmp_path, name):
    """Accumulation, micro-batches, minibatches and inner epochs leave the gradient of a round alone (1e-5, float32)."""
    method = METHODS[name]
    # PPO's round has no single-step form without its pass before; the others must not notice that pass.
    whole = gradient(tmp_path / "whole", method, 1)
    assert whole.norm() > 1e-2
    for label, steps, settings in SPLITS:
        found = gradient(tmp_path / label.replace(" ", "-"), method, steps, **settings)
        assert (found - whole).norm() < 1e-5 * whole.norm(), label


@pytest.mark.parametrize("name", METHODS)
def test_the_order_of_prompts_does_not_change_the_loss(tmp_path, name):
    """The mean over a batch is the same in any order."""
    method = METHODS[name]
    made = trainer(tmp_path, method, num_iterations=2)
    made.state.global_step = 0
    made.model.eval()
    losses = []
    for order in (list(range(8)), [5, 2, 7, 0, 1, 6, 3, 4]):
        batch = made.collect([made.rows[i] for i in order], order)
        with torch.no_grad():
            losses.append(float(method.loss(*inputs(made, batch.prompts))))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_what_is_collected_is_what_the_engine_says(tmp_path, temperature):
    """Behavior and reference log-probabilities are those of the drawn responses at the temperature of the draw."""
    made = trainer(tmp_path, METHODS["rkl"], num_iterations=2, temperature=temperature)
    model = made.model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    made.worker.draw_round([0], 0, 4096)
    drawn = made.worker.round
    groups = [Group(p, r) for p, r in zip(drawn.prompts, drawn.responses, strict=True)]
    for name, scored in (("behavior", model), ("reference", made.policy.reference)):
        with torch.no_grad():
            wanted = score(scored, groups, temperature=temperature).token_logps
        torch.testing.assert_close(drawn.tensors[f"{name}_token_logps"], wanted, rtol=1e-5, atol=1e-5)
    assert made.temperature == temperature
    rewards = Warmth()([Request(p, r) for p, r in zip(drawn.prompts, drawn.responses, strict=True)])
    assert torch.equal(drawn.tensors["rewards"], rewards)


def test_more_than_two_samples_make_all_pairs_or_the_extreme_one(tmp_path):
    """Of four responses six pairs, each once; best and worst by reward is one."""
    made = trainer(tmp_path, REBEL(1.0, 0.0))
    made.model.eval()
    drawn = made.collect(made.rows[:2], [0, 1]).prompts
    pairs, samples = inputs(made, drawn)
    assert not hasattr(samples, "token_logps")
    assert pairs.logps.shape == (12, 2)
    for place, prompt in enumerate(drawn):
        own = made.score([prompt.group]).logps
        wanted = torch.stack([torch.stack([own[a], own[b]]) for a in range(4) for b in range(a + 1, 4)])
        torch.testing.assert_close(pairs.logps[6 * place : 6 * place + 6], wanted)
        # What was drawn may be worth the same.
        prompt.constants["rewards"] = torch.tensor([1.0, 3.0, 0.0, 2.0]) + place
    extreme, _ = inputs(made, drawn, "best_worst")
    assert torch.equal(extreme.rewards.float(), torch.tensor([[3.0, 0.0], [4.0, 1.0]]))
    torch.testing.assert_close(extreme.logps[1], made.score([drawn[1].group]).logps[[1, 2]])
    torch.testing.assert_close(extreme.behavior_logps, extreme.logps.detach())


def test_a_loss_is_given_what_is_declared_and_no_more(tmp_path):
    """The reference is scored for the log at β = 0 too; the method does not see it."""
    for method, record in ((RKL(0.5, 0.0), 1), (REBEL(1.0, 0.0), 0)):
        made = trainer(tmp_path / type(method).__name__, method, num_iterations=2)
        made.model.eval()
        drawn = made.collect(made.rows[:2], [0, 1]).prompts
        assert "reference_token_logps" in drawn[0].constants
        given = inputs(made, drawn)[record]
        assert hasattr(given, "rewards")
        assert not {name for name in vars(given) if name.startswith("reference")}


def test_one_response_to_a_prompt_is_refused(tmp_path):
    """Pairs and leave-one-out baselines are made of several."""
    with pytest.raises(TrainingError, match=r"num_generations is 1, but pairs"):
        trainer(tmp_path, METHODS["rebel"], num_generations=1)


def test_rounds_go_through_all_prompts_and_each_inner_epoch_has_its_own_order():
    """Every row comes up num_iterations times an epoch, a batch is of one round, what is left is a smaller round."""
    batches = RoundBatches(11, batch_size=2, batches=2, num_iterations=3, seed=5)
    epochs = []
    for epoch in range(2):
        batches.set_epoch(epoch)
        found = list(batches)
        assert len(found) == len(batches)
        assert sorted(i for batch in found for i in batch) == sorted(list(range(11)) * 3)
        for batch in found:
            assert len({batches.round_of(i)[0] for i in batch}) == 1
        assert [len(rows) for rows in batches.rounds] == [4, 4, 3]
        epochs.append(found)
    assert epochs[0] != epochs[1]
    assert [i for b in epochs[0][:2] for i in b] != [i for b in epochs[0][2:4] for i in b]
    batches.set_epoch(0)
    assert list(batches) == epochs[0]
    assert batches.round_of(epochs[0][0][0])[0] == 0


# A run can stop anywhere ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "lora"), [("gpt2", None), ("llama", Lora(r=4, dropout=0.3))], ids=["gpt2, full", "llama, lora"]
)
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_dropout_is_off_for_an_on_policy_run(tmp_path, kind, lora):
    """What is trained is what was sampled: at learning rate 0 every weight is 1 and KL to the reference is 0."""
    made = trainer(tmp_path, METHODS["pd"], kind=kind, lora=lora, learning_rate=0.0, max_steps=3, num_iterations=3)
    made.train()
    rows = metrics(tmp_path)[:3]
    for row in rows:
        assert row["rollout/effective_samples"] == pytest.approx(1.0, abs=1e-5)
    assert rows[0]["objective/kl"] == pytest.approx(0.0, abs=1e-4)
    assert rows[0]["loss"] == pytest.approx(rows[2]["loss"], rel=1e-4)


def test_the_share_of_effective_samples_does_not_depend_on_the_split(tmp_path):
    """It is of all responses of an optimizer step, however they are split; so are its time and its tokens."""
    found = []
    for i, settings in enumerate(
        ({}, {"token_budget": 1}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4})
    ):
        made = trainer(tmp_path / str(i), METHODS["rkl"], num_iterations=3, max_steps=3, optim="sgd", **settings)
        made.train()
        found.append([row["rollout/effective_samples"] for row in metrics(tmp_path / str(i))[:3]])
    assert found[0][2] < 0.999
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-3)


def test_rounds_draw_by_different_random_numbers(tmp_path):
    """Two rounds over one prompt differ."""
    made = trainer(tmp_path, METHODS["pd"], rows=[prompts(1)[0]] * 4, per_device_train_batch_size=2)
    made.model.eval()
    drawn = []
    for index in (made.worker.batches.rounds[0][0], made.worker.batches.rounds[1][0]):
        made.worker.draw_round([index], 0, 4096)
        drawn.append(made.worker.round.responses)
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("lora", [None, Lora(r=4)], ids=["full", "lora"])
@pytest.mark.parametrize("name", sampled(["pmle", "pd", "rkl", "rkl-gae", "rebel"], "pd", "rkl-gae"))
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_a_run_that_goes_on_in_the_middle_of_a_round(tmp_path, name, lora):
    """Stopped after the third of four steps of a round, it ends bit for bit where the run that never stopped does."""
    settings = {
        "lora": lora,
        "per_device_train_batch_size": 2,
        "minibatches": 2,
        "num_iterations": 2,
        "max_steps": 7,
        "save_strategy": "steps",
        "save_steps": 3,
        "health": HealthSettings(),
    }
    whole = trainer(tmp_path / "whole", METHODS[name], **settings)
    whole.train()
    logged = logs(tmp_path / "whole")
    again = trainer(tmp_path / "whole", METHODS[name], **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert torch.equal(parameters(again), parameters(whole))
    assert logs(tmp_path / "whole") == logged


def test_a_round_that_goes_on_is_saved_where_it_stands(tmp_path):
    """Else a run that goes on twice would log it twice."""
    made = trainer(tmp_path, METHODS["pd"], rows=prompts(2), per_device_train_batch_size=2)
    made.worker.draw_round([made.worker.batches.rounds[0][0]], 0, 4096)
    drawn = made.worker.position_at(3)
    made.worker.begin()
    made.worker.resume(drawn, 13)
    assert made.worker.position_at(14).position == 4


FUNCTIONS = {
    "raises": ("raise KeyError('lost')", "raised KeyError"),
    "not a number": ("return [float('nan')] * len(completions)", "nan"),
    "wrong length": ("return [1.0]", "1"),
    "too slow": ("time.sleep(60)", "0.3"),
}


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_a_reward_that_fails_loses_nothing(tmp_path, kind):
    """The third round's reward fails: checkpoint and responses are saved, and mended the run ends as if nothing was."""
    body, told = FUNCTIONS[kind]
    (tmp_path / "calls").mkdir()
    good = "return [float(len(c)) for c in completions]"
    source = (
        "import os, time\nfrom pathlib import Path\n\n\ndef reward(prompts, completions, **columns):\n"
        f"    folder = Path({str(tmp_path / 'calls')!r})\n"
        "    (folder / str(len(list(folder.iterdir())))).touch()\n"
        "    if len(list(folder.iterdir())) == 3:\n        BODY\n    GOOD\n"
    )
    (tmp_path / "bad.py").write_text(source.replace("BODY", body).replace("GOOD", good))
    (tmp_path / "mended.py").write_text(source.replace("BODY", "pass").replace("GOOD", good))

    def run(name):
        return FunctionReward(f"{tmp_path / name}.py:reward", tiny.tokenizer(), timeout=0.3)

    made = trainer(tmp_path / "run", METHODS["rkl"], reward=run("bad"), max_steps=4, per_device_train_batch_size=4)
    with pytest.raises(RewardError, match="--resume") as error:
        made.train()
    assert told in str(error.value)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert (checkpoint / "rollout.safetensors").is_file()
    assert (checkpoint / "optimizer.pt").is_file()
    again = trainer(tmp_path / "run", METHODS["rkl"], reward=run("mended"), max_steps=4, per_device_train_batch_size=4)
    again.train(resume_from_checkpoint=str(checkpoint))
    whole = trainer(
        tmp_path / "whole", METHODS["rkl"], reward=run("mended"), max_steps=4, per_device_train_batch_size=4
    )
    whole.train()
    assert torch.equal(parameters(again), parameters(whole))


class Given(Reward):
    """A user's own reward, which gives what it was given."""

    def __init__(self, give):
        self.give = give

    def __call__(self, requests):
        """Whatever it is."""
        return self.give(sum(len(request.responses) for request in requests))


@pytest.mark.parametrize(
    ("give", "message"),
    [
        (lambda n: torch.ones(n, 1), r"reward Given: gave a tensor of shape \[32, 1\]; give .* each of 32 responses"),
        (lambda n: torch.ones(n - 1), r"shape \[31\]"),
        (lambda n: [1.0] * n, r"reward Given: gave list"),
        (lambda n: torch.full((n,), torch.nan), r"reward Given: 32 of 32 rewards are not finite"),
    ],
    ids=["column", "short", "list", "nan"],
)
def test_a_reward_of_ones_own_gives_a_number_for_each_response(tmp_path, give, message):
    """Anything else is refused before a round takes it."""
    with pytest.raises(RewardError, match=message):
        trainer(tmp_path, METHODS["rkl"], reward=Given(give)).train()


def test_a_policy_saved_early_has_no_value_head(tmp_path):
    """It is the method's, and goes after training."""
    made = trainer(tmp_path, METHODS["rkl-gae"])
    made.save_model(str(tmp_path / "early"))
    assert not [name for name in load_file(tmp_path / "early" / "model.safetensors") if "value_head" in name]

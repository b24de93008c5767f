"""TRL as an oracle: the same token ids through its trainers and through our losses, values and gradients compared."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from distalign.engine import Group, score
from distalign.methods import DPO, PMLE, RKL, RLHF, Pairs, Samples

# The trainers' own deprecations are not ours to fix.
pytestmark = pytest.mark.filterwarnings("ignore")

PAD, EOS = 0, 1
ROWS = [
    {"prompt": "w2 w3 w4", "chosen": " w5 w6 <eos>", "rejected": " w7 <eos>"},
    {"prompt": "w9", "chosen": " w5 <eos>", "rejected": " w7 w8 w9 w10 <eos>"},
    {"prompt": "w4 w4", "chosen": " w11 w5 w2 <eos>", "rejected": " w6 <eos>"},
]


@pytest.fixture
def tokenizer():
    """One token a word; nothing is downloaded."""
    words = {"<pad>": PAD, "<eos>": EOS, **{f"w{i}": i for i in range(2, 20)}}
    core = Tokenizer(WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


def tiny_model(seed):
    """A one-layer model with random weights large enough that its preferences are not all one half."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.5,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def arguments(tmp_path):
    """What every TRL trainer needs to be told on this machine."""
    return {
        "output_dir": str(tmp_path / "trl"),
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }


def token_logps(model, ids, attention, mask):
    """Log-probability of each token given those before it, [rows, steps − 1], and the response mask beside it."""
    logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits[:, :-1]
    logps = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return logps, mask[:, 1:].bool()


def pair_logps(model, ids, attention, mask):
    """Sequence log-probabilities [pairs, 2] of a batch stacked as all chosen, then all rejected."""
    logps, mask = token_logps(model, ids, attention, mask)
    return (logps * mask).sum(-1).view(2, -1).T


def weight_gradient(loss, model):
    """Derivative in all weights, as one vector."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def assert_same(ours, theirs, model):
    """Value and gradient agree to float32 rounding, and the gradient is not trivially zero."""
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    mine, their = weight_gradient(ours, model), weight_gradient(theirs, model)
    assert their.norm() > 1e-3
    assert (mine - their).norm() < 1e-5 * their.norm()


def test_dpo_is_trl_dpo(tokenizer, arguments):
    """DPO = DPOTrainer's sigmoid loss with their beta as our gamma, on its own collated batch."""
    from trl import DPOConfig, DPOTrainer

    trainer = DPOTrainer(
        tiny_model(0),
        ref_model=tiny_model(1),
        args=DPOConfig(beta=0.3, per_device_train_batch_size=3, **arguments),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    given = batch["input_ids"], batch["attention_mask"], batch["completion_mask"]
    with torch.no_grad():
        reference_logps = pair_logps(trainer.ref_model, *given)
    ours = DPO(gamma=0.3).loss(Pairs(pair_logps(trainer.model, *given), reference_logps), Samples())
    assert_same(ours, trainer.compute_loss(trainer.model, batch), trainer.model)


def test_pmle_without_kl_is_trl_cpo(tokenizer, arguments):
    """PMLE at β = 0 = CPOTrainer's sigmoid loss without its likelihood term: CPO's preference part, reference-free."""
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    trainer = CPOTrainer(
        tiny_model(0),
        args=CPOConfig(
            beta=0.3, cpo_alpha=0.0, loss_type="sigmoid", max_length=32, per_device_train_batch_size=3, **arguments
        ),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    stacked = trainer.concatenated_inputs(batch, padding_value=PAD)
    given = stacked["concatenated_input_ids"], stacked["concatenated_attention_mask"]
    logps = pair_logps(trainer.model, *given, stacked["concatenated_labels"] != -100)
    ours = PMLE(gamma=0.3, beta=0.0).loss(Pairs(logps), Samples())
    assert_same(ours, trainer.compute_loss(trainer.model, batch), trainer.model)


GAMMA, BETA, TEMPERATURE, SAMPLES = 0.2, 0.1, 0.7, 3


def length_and_first(completion_ids):
    """A reward of the token ids alone, different for almost any two responses."""
    return [float(len(ids)) - 0.1 * ids[0] for ids in completion_ids]


def rloo(tokenizer, arguments, folder, *, beta, shift, **settings):
    """TRL's trainer in float64, with its own batch of responses, advantages in it, for the reward R − shift · ln π₀."""
    from trl import RLOOConfig, RLOOTrainer

    reference = tiny_model(1)
    reference.save_pretrained(folder / "reference")
    reference.double()
    policy = tiny_model(0)
    policy.config._name_or_path = str(folder / "reference")  # where RLOOTrainer looks for its reference

    @torch.no_grad()
    def reward(prompts, completion_ids, **_):
        groups = [
            Group(tokenizer(prompt).input_ids, [ids]) for prompt, ids in zip(prompts, completion_ids, strict=True)
        ]
        logps = score(reference, groups, temperature=TEMPERATURE).logps
        return (torch.tensor(length_and_first(completion_ids)) - shift * logps).tolist()

    trainer = RLOOTrainer(
        policy,
        reward_funcs=reward,
        args=RLOOConfig(
            beta=beta,
            num_generations=SAMPLES,
            per_device_train_batch_size=SAMPLES * len(ROWS),
            max_completion_length=4,
            temperature=TEMPERATURE,
            **settings,
            **arguments,
        ),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in ROWS]),
        processing_class=tokenizer,
    )
    trainer.model.double()
    trainer.ref_model.double()
    rows = [{"prompt": row["prompt"]} for row in ROWS for _ in range(SAMPLES)]
    return trainer, reference, trainer._generate_and_score_completions(rows)


def groups_of(batch):
    """The token ids of TRL's batch as prompts with their responses."""

    def kept(name):
        rows = zip(batch[f"{name}_ids"], batch[f"{name}_mask"], strict=True)
        return [ids[mask.bool()].tolist() for ids, mask in rows]

    prompts, responses = kept("prompt"), kept("completion")
    return [Group(prompts[at], responses[at : at + SAMPLES]) for at in range(0, len(prompts), SAMPLES)]


def assert_is_rloo(method, made, *, reused):
    """The method's advantages and weight gradient are those of TRL's trainer, within 1e-5.

    Both sides score the token ids that TRL sampled, TRL with its own forward pass and we with the engine. The models
    are float64, so what is left (below 1e-6) is TRL's rounding of rewards and advantages to float32.
    """
    trainer, reference, batch = made
    groups = groups_of(batch)
    scores = score(trainer.model, groups, reference=reference, temperature=TEMPERATURE)
    samples = Samples(
        token_logps=scores.token_logps,
        mask=scores.mask,
        **({"behavior_token_logps": scores.token_logps.detach()} if reused else {}),
        reference_token_logps=scores.reference_token_logps,
        rewards=torch.tensor(length_and_first([ids for group in groups for ids in group.responses])).double(),
        group=scores.group,
    )
    loss = method.loss(Pairs(), samples)
    # A response enters the loss as −A ln π / n, so its advantage can be read off any of its tokens.
    (slope,) = torch.autograd.grad(loss, scores.token_logps, retain_graph=True)
    advantages = -len(slope) * slope
    expected = batch["advantages"].double()
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(advantages[:, 0], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(advantages, torch.where(scores.mask, expected[:, None], 0.0), rtol=0, atol=1e-5)
    ours = weight_gradient(loss, trainer.model)
    theirs = weight_gradient(trainer.compute_loss(trainer.model, batch), trainer.model)
    assert theirs.norm() > 1e-3
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()


reused_or_not = pytest.mark.parametrize("reused", [False, True], ids=["fresh", "reused"])


@reused_or_not
def test_rkl_is_trl_rloo(reused, tokenizer, arguments, tmp_path):
    """RKL = RLOOTrainer with beta = β + γ and reward R − γ ln π₀.

    `reused` is the first pass over responses that will be used again: there the policy is still the one that drew them.
    Later passes differ on purpose: TRL keeps the first pass's advantages, whose KL term is then stale, and clips.
    """
    settings = {"num_iterations": 2} if reused else {}
    made = rloo(tokenizer, arguments, tmp_path, beta=BETA + GAMMA, shift=GAMMA, **settings)
    assert_is_rloo(RKL(gamma=GAMMA, beta=BETA), made, reused=reused)


@reused_or_not
def test_rlhf_is_trl_rloo(reused, tokenizer, arguments, tmp_path):
    """RLHF = RLOOTrainer with the same beta and the reward as it is."""
    settings = {"num_iterations": 2} if reused else {}
    made = rloo(tokenizer, arguments, tmp_path, beta=BETA, shift=0.0, **settings)
    assert_is_rloo(RLHF(beta=BETA), made, reused=reused)

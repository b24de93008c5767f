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

from distalign.methods import DPO, PMLE, RKL, Pairs, Samples

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
    ours = DPO(gamma=0.3).loss(Pairs(pair_logps(trainer.model, *given), reference_logps), None)
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
    ours = PMLE(gamma=0.3, beta=0.0).loss(Pairs(logps), None)
    assert_same(ours, trainer.compute_loss(trainer.model, batch), trainer.model)


def test_rkl_is_trl_rloo(tokenizer, arguments, tmp_path):
    """RKL = RLOOTrainer with beta = β + γ and reward R − γ ln π₀: the gradient of its loss on responses it sampled."""
    from trl import RLOOConfig, RLOOTrainer

    gamma, beta = 0.2, 0.1
    reference = tiny_model(1)
    reference.save_pretrained(tmp_path / "reference")
    policy = tiny_model(0)
    policy.config._name_or_path = str(tmp_path / "reference")  # where RLOOTrainer looks for its reference

    def score(completion_ids):
        return [float(len(ids)) - 0.1 * ids[0] for ids in completion_ids]

    def reference_logp(prompt, ids):
        row = torch.tensor([[*tokenizer(prompt).input_ids, *ids]])
        logps = reference(input_ids=row).logits[0, :-1].log_softmax(-1)
        return logps.gather(-1, row[0, 1:, None])[-len(ids) :].sum().item()

    @torch.no_grad()
    def shifted_reward(prompts, completion_ids, **_):
        kept = zip(score(completion_ids), prompts, completion_ids, strict=True)
        return [r - gamma * reference_logp(prompt, ids) for r, prompt, ids in kept]

    trainer = RLOOTrainer(
        policy,
        reward_funcs=shifted_reward,
        args=RLOOConfig(
            beta=beta + gamma,
            num_generations=3,
            per_device_train_batch_size=9,
            max_completion_length=4,
            temperature=1.0,
            **arguments,
        ),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in ROWS]),
        processing_class=tokenizer,
    )
    batch = trainer._generate_and_score_completions([{"prompt": row["prompt"]} for row in ROWS for _ in range(3)])
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    mask = torch.cat([torch.zeros_like(batch["prompt_mask"]), batch["completion_mask"]], 1)
    logps, response = token_logps(trainer.model, ids, attention, mask)
    with torch.no_grad():
        reference_logps, _ = token_logps(reference, ids, attention, mask)
    kept = [row[m.bool()].tolist() for row, m in zip(batch["completion_ids"], batch["completion_mask"], strict=True)]
    samples = Samples(
        token_logps=logps,
        mask=response,
        reference_token_logps=reference_logps,
        rewards=torch.tensor(score(kept)),
        group=torch.arange(3).repeat_interleave(3),
    )
    ours = weight_gradient(RKL(gamma=gamma, beta=beta).loss(None, samples), trainer.model)
    theirs = weight_gradient(trainer.compute_loss(trainer.model, batch), trainer.model)
    assert theirs.norm() > 1e-3
    assert (ours - theirs).norm() < 1e-4 * theirs.norm()

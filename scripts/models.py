"""Every causal language model of transformers, built small: are its scores and its samples those of its own forward?

    python scripts/models.py [--only llama,bert] > docs/models.md

A type is served (how, is said), refused with a message, or could not be built small by the rules below.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import warnings
from collections import Counter
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from distalign.engine import Group, check, score
from distalign.errors import InputError
from distalign.rollout.sample import sample
from distalign.rollout.trial import way_of

TOLERANCE, SECONDS, LARGEST = 1e-4, 60, 40_000_000
GROUPS = [
    Group([5, 9, 17, 33, 40, 8, 71], [[11, 12, 13, 14], [50], [61, 62]]),
    Group([7, 3], [[88, 90, 3, 4]]),
]
# Sizes by the names that configurations give them; each is set where a configuration has it.
SIZES: dict[str, Any] = {
    "vocab_size": 101, "unpadded_vocab_size": 101, "hidden_size": 32, "d_model": 32, "n_embd": 32, "emb_dim": 32,
    "embedding_size": 32,
    "intermediate_size": 48, "ffn_dim": 48, "n_inner": 48, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48, "d_ff": 48,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "decoder_layers": 2, "encoder_layers": 2, "num_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "decoder_attention_heads": 4, "encoder_attention_heads": 4,
    "num_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "d_kv": 8, "rotary_dim": 8, "attention_hidden_size": 32,
    "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64, "initializer_range": 0.3, "init_std": 0.3,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_topk": 2, "n_shared_experts": 1,
    "top_k_experts": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "state_size": 8, "index_n_heads": 2, "index_head_dim": 16,
    "full_attention_interval": 2,
    "attn_layer_period": 2, "attn_layer_offset": 1, "attn_layer_indices": [1], "lru_width": 32,
    "attention_window_size": 16, "mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 8,
    "mamba_num_heads": 8, "mamba_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 101, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# By length of a list: one entry for each layer.
PER_LAYER = ("layer_types", "layers_block_type", "mlp_layer_types", "attention_types", "attn_layers", "layer_kinds")


class TooLong(Exception):
    """A type took longer than its time."""


def small(kind: str) -> Any:
    """A configuration of that type with small sizes, its text part where it has several."""
    own = AutoConfig.for_model(kind)
    given = dict(own.to_dict())
    names = {*given, *own.attribute_map}
    settings = {name: value for name, value in SIZES.items() if name in names}
    for name, part in given.items():  # the parts of a model of several kinds of input
        if isinstance(part, dict) and name.endswith("_config"):
            settings[name] = {key: value for key, value in SIZES.items() if key in part}
    if "qk_rope_head_dim" in names:  # latent attention: its heads are of two parts
        settings |= {"head_dim": 8, "num_key_value_heads": 4} if "head_dim" in names else {"num_key_value_heads": 4}
    for name in PER_LAYER:
        if isinstance(given.get(name), list) and given[name]:
            different = list(dict.fromkeys(map(str, given[name])))
            settings[name] = [different[0], different[-1]]
    return AutoConfig.for_model(kind, **settings)


def build(kind: str) -> Any:
    """The model, in float32 and evaluation mode; raises whatever its family raises."""
    torch.manual_seed(1)
    config = small(kind)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size / 1e6:.0f} million parameters with small sizes")
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config).float().eval()


@torch.no_grad()
def own_logps(model: Any) -> torch.Tensor:
    """Log-probabilities of the responses, one sequence at a time."""
    values = []
    for group in GROUPS:
        for response in group.responses:
            ids = torch.tensor([[*group.prompt, *response]])
            logits = model(input_ids=ids, use_cache=False).logits[0, -len(response) - 1 : -1]
            values.append(logits.log_softmax(-1)[range(len(response)), response].sum())
    return torch.stack(values)


@torch.no_grad()
def agrees(model: Any) -> str:
    """ "" if greedy samples are those of a plain loop, else where they are not."""
    prompts = [group.prompt for group in GROUPS]
    drawn = sample(model, prompts, n=2, max_new_tokens=5, temperature=0, end_id=2, seed=0)
    for prompt, both in zip(prompts, drawn, strict=True):
        ids = list(prompt)
        for token in both[0]:
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(-1)
            # Of two that rounding cannot tell apart either may be taken.
            if logits.max() - logits[token] > TOLERANCE:
                return f"the sampled token {token} is {float(logits.max() - logits[token]):.2g} nats below the best"
            ids.append(token)
        if both[0] != both[1]:
            return "two greedy responses to one prompt differ"
    return ""


def row(kind: str) -> tuple[str, str, str]:
    """(outcome, how it is scored and sampled, what was found)."""
    try:
        model = build(kind)
        truth = own_logps(model)
    except TooLong:
        return "not built", "", f"more than {SECONDS} s"
    except Exception as error:  # of any family
        return "not built", "", f"{type(error).__name__}: {' '.join(str(error).split())[:90]}"
    try:
        with torch.no_grad():
            found = score(model, GROUPS).logps
        error = float((found - truth).abs().max())
        sampled = agrees(model)
        way = way_of(model, [], 16)
        how = f"{check(model).path}, {'uncached' if way.cache == 'none' else way.prompts}"
    except InputError as refusal:
        return "refused", "", str(refusal)[:110]
    except TooLong:
        return "WRONG", "", f"more than {SECONDS} s"
    except Exception as error:
        return "WRONG", "", f"{type(error).__name__}: {' '.join(str(error).split())[:90]}"
    if not error <= TOLERANCE * max(1.0, float(truth.abs().max())):
        return "WRONG", how, f"scores differ by {error:.2g} nats"
    return ("WRONG", how, sampled) if sampled else ("served", how, f"{error:.0e}")


def main() -> int:
    """Print the table; 1 if a type is served wrongly."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="types, with commas")
    only = [kind for kind in parser.parse_args().only.split(",") if kind]
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)

    def ring(*_: object) -> None:
        raise TooLong

    signal.signal(signal.SIGALRM, ring)
    rows = {}
    for kind in only or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        signal.alarm(SECONDS)
        try:
            rows[kind] = row(kind)
        except TooLong:
            rows[kind] = ("WRONG", "", f"more than {SECONDS} s")
        signal.alarm(0)
        print(kind, *rows[kind], file=sys.stderr, flush=True)
    counts = Counter(outcome for outcome, _, _ in rows.values())
    print("# Models\n")
    print(
        "Every type of `AutoModelForCausalLM`, built small with random weights: log-probabilities of responses and "
        "greedy samples against the model's own forward, one sequence at a time, to 1e-4 (relative to the largest "
        "sum). Scored: `shared` (a prompt once for all its responses), `padded`, `plain` (one sequence at a time). "
        "Sampled: `padded`, `equal` (prompts of one length at a time), `uncached` (each token reads the whole sequence "
        "again). "
        f"Made by `python scripts/models.py` with transformers {transformers.__version__}: "
        + ", ".join(f"{number} {outcome}" for outcome, number in sorted(counts.items()))
        + ".\n"
    )
    print("| type | outcome | scored, sampled | largest difference, or why |\n| --- | --- | --- | --- |")
    for kind, (outcome, how, what) in rows.items():
        print(f"| {kind} | {outcome} | {how} | {what.replace('|', ' ')} |")
    return int(counts["WRONG"] > 0)


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.exit(main())

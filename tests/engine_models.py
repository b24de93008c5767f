"""Tiny random models of many families, and their log-probabilities found the slow way: one sequence at a time."""

from __future__ import annotations

from importlib.metadata import version

import torch
from packaging.version import Version
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from distalign.engine import Group

VOCABULARY = 101
# transformers 5.24 gave GPT-J the attention of all others.
NEW_CACHE = Version(version("transformers")) >= Version("5.24")

# Weights large enough that one wrong attention edge moves a log-probability by more than 0.1 nats.
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ALTERNATING = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 5}

# name: (model type, settings, path that serves it)
FAMILIES = {
    "llama": ("llama", {}, "shared"),
    "llama_dropout": ("llama", {"attention_dropout": 0.3}, "shared"),
    "qwen2": ("qwen2", {}, "shared"),
    "qwen2_window": ("qwen2", {"use_sliding_window": True, **_ALTERNATING}, "shared"),
    "qwen3": ("qwen3", {}, "shared"),
    "mistral": ("mistral", {"sliding_window": None}, "shared"),
    "mistral_window": ("mistral", {"sliding_window": 5}, "shared"),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0, **_ALTERNATING}, "shared"),
    "gemma3": ("gemma3_text", {"query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0, **_ALTERNATING}, "shared"),
    "gpt_neox": ("gpt_neox", {}, "shared"),
    "gpt2": ("gpt2", {}, "shared"),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}, "shared"),
    "phi3": ("phi3", {}, "shared"),
    "phi3_window": ("phi3", {"sliding_window": 5}, "shared"),
    "mixtral": ("mixtral", _EXPERTS, "shared"),
    "cohere": ("cohere", {"logit_scale": 0.25}, "shared"),
    "granite": ("granite", {"logits_scaling": 3.0, "residual_multiplier": 0.7}, "shared"),
    "gpt_oss": ("gpt_oss", {**_EXPERTS, **_ALTERNATING}, "shared"),
    "falcon": ("falcon", {"alibi": False, "new_decoder_architecture": False}, "padded"),
    "gptj": ("gptj", {"n_embd": 32, "rotary_dim": 4}, "shared" if NEW_CACHE else "padded"),
    "mpt": ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 3}, "padded"),
    "olmo2": ("olmo2", {}, "shared"),
    "starcoder2": ("starcoder2", {"sliding_window": 5}, "shared"),
    "deepseek_v3": (
        "deepseek_v3",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
        },
        "shared",
    ),
    "llama4": ("llama4_text", {**_EXPERTS, "intermediate_size_mlp": 48, "attention_chunk_size": 5}, "padded"),
    "bloom": ("bloom", {"n_head": 4, "n_layer": 3}, "padded"),
    "mamba": ("mamba", {"state_size": 8}, "padded"),
    "qwen3_next": (
        "qwen3_next",
        {
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
        "padded",
    ),
}

GROUPS = [
    Group([5, 9, 17, 33, 40, 8, 71], [[11, 12, 13, 14, 15, 16, 2], [50], [61, 62, 2]]),
    Group([7], [[88, 90, 3, 4, 2]]),
    Group([21, 22, 23, 24], [[31, 32], [41, 42, 43, 44, 45, 46, 47, 48, 2]]),
]


def build(family: str = "llama", dtype: torch.dtype = torch.float64, **settings) -> torch.nn.Module:
    """A tiny model with random weights, norms and biases included."""
    torch.manual_seed(1)
    kind, own, _ = FAMILIES[family]
    known = AutoConfig.for_model(kind)
    options = {name: value for name, value in _COMMON.items() if name in known.to_dict() or name in known.attribute_map}
    if kind == "gemma2":
        # Before 5.21 its default is SDPA, which leaves the caps of its scores out.
        options["attn_implementation"] = "eager"
    config = AutoConfig.for_model(kind, **{**options, **own, **settings})
    # The grouped kernel for experts has no float64; transformers' plain loop does.
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def checkpointing(model):
    """The model's method that turns recomputing on, under the name of this transformers."""
    return getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable


def direct_logits(model, groups=GROUPS) -> list[Tensor]:
    """Per response, the model's own logits [tokens, vocabulary], each sequence encoded on its own."""
    out = []
    for group in groups:
        for response in group.responses:
            ids = torch.tensor([group.prompt + response])
            out.append(model(input_ids=ids, use_cache=False).logits[0, len(group.prompt) - 1 : -1])
    return out


def direct_token_logps(model, groups=GROUPS, temperature=1.0) -> list[Tensor]:
    """Per response, ln π of its tokens."""
    responses = [response for group in groups for response in group.responses]
    return [
        (logits / temperature).log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]
        for logits, response in zip(direct_logits(model, groups), responses, strict=True)
    ]


def gradients(model) -> dict[str, Tensor]:
    """Gradients of all parameters that have one, removed from the model."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest difference of two sets of gradients, relative to the largest gradient (a missing one counts as zero)."""
    size = max(value.abs().max().item() for value in b.values())
    worst = 0.0
    for name in a.keys() | b.keys():
        left, right = a.get(name), b.get(name)
        gap = left - right if left is not None and right is not None else left if right is None else right
        worst = max(worst, gap.abs().max().item())
    return worst / size

"""What a caller gives to `AlignmentTrainer`, made into what it trains with: a method, a policy, encoded rows, a reward.

Everything that can be read without weights is read, and refused, before they are loaded.
"""

from __future__ import annotations

import copy
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import (
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from distalign.data import EncodedPair, Tokenizer, end_token_id
from distalign.engine.memory import set_recompute
from distalign.methods import METHODS, Method
from distalign.models.load import (
    ModelError,
    Source,
    check_positions,
    check_token_ids,
    find_model,
    positions,
)
from distalign.models.policy import Lora, Policy, adapter_off, check_startable, make_policy, share, trained_temperature
from distalign.models.quantized import is_quantized, keep_exact, settings_of
from distalign.models.verify import check_adapter
from distalign.rollout.vllm import VLLMServer
from distalign.settings import find_recipe, read_yaml
from distalign.training.config import AlignmentConfig
from distalign.training.reward_funcs import RewardFunc, check_reward_funcs, needs_base, reward_list
from distalign.training.rollout_settings import (
    RolloutSettings,
    TrainingError,
    check_rollout,
    draws_responses,
    is_on_policy,
)
from distalign.training.rows import Rows, RowSource, check_kind, read_pairs_of, read_rows

logger = logging.getLogger("distalign.training.trainer")

# Text on which tokenizers of different kinds differ.
_PROBE = "How do I say “12,345 x”?\n  Like this: é"

Model = str | PreTrainedModel | PeftModel


def as_method(method: str | Method) -> tuple[str, Method]:
    """The method and its short name; by name it has the settings of the packaged recipe `pairs`.

    Raises TrainingError for a name that there is not.
    """
    if isinstance(method, Method):
        return type(method).__name__.lower(), method
    if isinstance(method, str) and method in METHODS:
        return method, METHODS[method](**read_yaml(find_recipe("pairs"))["methods"].get(method, {}))
    near = get_close_matches(str(method).lower(), METHODS, 1)
    hint = f'; did you mean "{near[0]}"?' if near else ""
    found = repr(method) if isinstance(method, str) else f"a {type(method).__name__}"
    raise TrainingError(f"method is {found}; give a Method or one of {', '.join(METHODS)}{hint}")


# Reading --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Given:
    """What a caller gave that can be read without weights. `encode` makes pairs of rows as this run does."""

    source: Source
    tokenizer: PreTrainedTokenizerBase
    rows: Rows
    encode: Callable[[Any, str], list[EncodedPair]]
    rewards: list[RewardFunc]
    end_id: int


def read_given(
    label: str,
    method: Method,
    args: AlignmentConfig,
    *,
    model: Model | Policy,
    processing_class: object,
    train: RowSource | None,
    held_out: RowSource | Mapping[str, RowSource] | None,
    reward_funcs: RewardFunc | Sequence[RewardFunc] | None,
) -> Given:
    """Everything that can be known before weights are loaded, checked. Raises InputError for what cannot be used."""
    check_arguments(label, args)
    rewards = reward_list(reward_funcs)
    check_given(label, method, args, rewards=bool(rewards), held_out=held_out)
    source = model.source if isinstance(model, Policy) else find_source(model, args)
    config = source.config() if isinstance(model, str) else config_of(model)
    check_end_token(config, args)
    temperature, before = temperature_of(method, args), trained_temperature(source.adapter or source.path)
    if before not in (None, temperature):
        logger.warning(
            "%s: the model was trained at temperature %g and is taken at %g, as start and reference: another "
            "distribution than it learned", label, before, temperature,
        )  # fmt: skip
    tokenizer = find_tokenizer(model, processing_class, source)
    if processing_class is not None:
        warn_of_reloading(tokenizer, config)
    encode = partial(read_pairs_of, tokenizer=tokenizer, args=args, limit=positions(config))
    rows = read_rows(train, held_out, tokenizer, method, encode)
    check_rows(rows, source, config, method, args)
    check_reward_funcs(label, method, rewards, rows, args)
    return Given(source, tokenizer, rows, encode, rewards, response_end(rows, tokenizer, args))


def check_rows(rows: Rows, source: Source, config: PretrainedConfig, method: Method, args: AlignmentConfig) -> None:
    """Raise InputError if the model does not know a token, or has no room for responses."""
    pairs = [ids for pair in rows.pairs for ids in (pair.prompt, pair.chosen, pair.rejected)]
    check_token_ids(source.name, config, pairs or (row.prompt for row in rows.train))
    if draws_responses(method):
        longest = args.max_completion_length
        check_positions(source.name, config, [row.prompt for row in rows.train], longest, "max_completion_length")


def temperature_of(method: Method, args: AlignmentConfig) -> float:
    """The policy of a run that draws is softmax(logits / temperature), in every term."""
    return args.temperature if draws_responses(method) else 1.0


def check_end_token(config: PretrainedConfig, args: AlignmentConfig) -> None:
    """Raise TrainingError if the token that is to end a response is none of the model's."""
    if args.end_token_id is not None and args.end_token_id >= config.get_text_config().vocab_size:
        raise TrainingError(f"end_token_id is {args.end_token_id}, and the model has no such token")


def response_end(rows: Rows, tokenizer: Tokenizer, args: AlignmentConfig) -> int:
    """The token that ends a response. Raises InputError if there is none."""
    if args.end_token_id is not None:
        return args.end_token_id
    return end_token_id(tokenizer, conversational=rows.conversational)


# The policy -----------------------------------------------------------------------------------------------------------


def find_source(model: Model, args: AlignmentConfig) -> Source:
    """Where the model comes from: a name is looked up, nothing is loaded. Raises ModelError."""
    if not isinstance(model, str | PreTrainedModel | PeftModel):
        raise ModelError(f"model is a {type(model).__name__}; give a name, a folder, a PreTrainedModel or a PeftModel")
    if isinstance(model, str):
        settings = args.model_settings
        source = find_model(model, trust_remote_code=bool(settings.get("trust_remote_code", False)))
        config = settings.get("quantization_config")
        return source if config is None else source.in_4bit(settings_of(config))
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    name = str(getattr(base, "name_or_path", "") or type(base).__name__)
    if base.get_output_embeddings() is None or base.config.is_encoder_decoder:
        raise ModelError(
            f"model {name}: a {type(base).__name__} is no causal language model; load one by AutoModelForCausalLM"
        )
    return Source(name, name, "given as an object")


def find_tokenizer(model: Model | Policy, processing_class: object, source: Source) -> Any:
    """The tokenizer that was given, or the model's own. Raises ModelError."""
    if isinstance(model, Policy):
        return model.tokenizer
    if processing_class is not None:
        wanted = "a tokenizer, such as AutoTokenizer.from_pretrained(…), or a processor's"
        check_kind("processing_class", processing_class, PreTrainedTokenizerBase, wanted)
        return processing_class
    if isinstance(model, str):
        return source.tokenizer()
    try:
        return AutoTokenizer.from_pretrained(source.path)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"model {source.name}: it came as an object; pass its tokenizer as processing_class"
        ) from error


def warn_of_reloading(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """Warn where a saved model's tokenizer would not be this one: transformers picks its class by the model's type."""
    with TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        try:
            again = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            ids = again(_PROBE)["input_ids"]
        except (OSError, ValueError, KeyError, ImportError) as error:
            logger.warning("the saved model's tokenizer will not load: %s", error)
            return
    if ids != tokenizer(_PROBE)["input_ids"]:
        logger.warning(
            "the saved model's tokenizer will give other tokens than processing_class: beside a model of type %s "
            "transformers reads it as %s; take the model's own tokenizer, or load the saved one by its class, %s",
            config.model_type, type(again).__name__, type(tokenizer).__name__,
        )  # fmt: skip


def load_policy(
    label: str,
    method: Method,
    args: AlignmentConfig,
    given: Given,
    model: Model | Policy,
    peft_config: PeftConfig | None,
    optimizer: torch.optim.Optimizer | None,
) -> tuple[Policy, PreTrainedModel | None]:
    """The policy as it is trained by a method, and the model that it starts from, if rewards ask for it.

    Raises ModelError and TrainingError for what cannot be trained.
    """
    if method.needs.values and optimizer is not None:
        raise TrainingError(
            f"{label}: the optimizer was made before the critic's value head and would not train it; leave it to the "
            "settings (optim, learning_rate)"
        )
    if isinstance(model, Policy):
        policy, base = model, None
    else:
        set_seed(args.seed)
        reference, frozen = method.needs.reference or method.needs.kl, needs_base(given.rewards)
        policy, base = _make_policy(
            model, given.tokenizer, given.source, peft_config, args, reference=reference, frozen=frozen
        )
    check_policy(label, method, policy)
    check_trained(label, policy.model, optimizer)
    warn_of_rounding(label, policy.model, args)
    if args.recompute != "none":
        try:
            set_recompute(policy.model, args.recompute)
        except ValueError as error:
            raise TrainingError(f"{label}: recompute is {args.recompute}: {error}; leave it out") from None
    if is_on_policy(method):
        policy.disable_dropout()
    if method.needs.values:
        policy.add_value_head()
    return policy, base


def _make_policy(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    source: Source,
    peft_config: PeftConfig | None,
    args: AlignmentConfig,
    *,
    reference: bool,
    frozen: bool,
) -> tuple[Policy, PreTrainedModel | None]:
    """The policy, and the model that it starts from without an adapter (None unless `frozen` asks for it).

    A `PeftModel` trains its own adapter, and its reference is the model with the adapter off. With `peft_config` a
    model gets a new adapter. Otherwise all its weights are trained, in place; the reference is then a frozen copy.
    Raises ModelError for quantised weights without an adapter, by name before they are loaded.
    """
    if isinstance(model, PeftModel):
        if peft_config is not None:
            raise TrainingError("model has an adapter and peft_config asks for another; give one of them")
        keep_exact(f"model {source.name}", model)
        source.check_holds(model.get_base_model())
        policy = Policy(model, tokenizer, source, adapter_off(model), new_adapter=False)
        return policy, share(model).unload() if frozen else None
    if not isinstance(model, str):
        if is_quantized(model) and peft_config is None:
            raise ModelError(f"model {source.name}: quantised weights cannot be trained; pass peft_config")
        if peft_config is not None:
            source.check_holds(model)
        model.to(args.device)  # pyright: ignore[reportArgumentType]
    else:
        source.check_trainable(adapter=peft_config is not None)
        dtype = str(args.model_settings.get("dtype", "float32")).removeprefix("torch.")
        # An adapter that was merged leaves the weights frozen.
        model = source.model(dtype, args.device).requires_grad_(peft_config is None)
        check_startable(model, source)
    if peft_config is not None:
        return make_policy(model, tokenizer, source, lora=peft_config, reference=True), model
    copied = copy.deepcopy(model).requires_grad_(False).eval() if reference or frozen else None
    return Policy(model, tokenizer, source, copied if reference else None), copied


# Checks ---------------------------------------------------------------------------------------------------------------


def check_trained(label: str, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Raise TrainingError if nothing would be trained: all weights frozen, or none of them in a given optimizer."""
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    if not trained:
        raise TrainingError(
            f"{label}: every weight of the model is frozen (by another trainer, which put an adapter on it?); set "
            "requires_grad, or pass peft_config"
        )
    given = [p for group in (optimizer.param_groups if optimizer is not None else ()) for p in group["params"]]
    if given and not any(id(parameter) in trained for parameter in given):
        raise TrainingError(
            f"{label}: the optimizer holds none of the weights that are trained; make it from those of the model "
            "that is trained (with an adapter: get_peft_model first, and pass the PeftModel)"
        )


def warn_of_rounding(label: str, model: nn.Module, args: AlignmentConfig) -> None:
    """Warn of 16-bit weights that are trained as they are: most updates are smaller than their rounding."""
    kinds = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad}
    # Both keep weights of 32 bits beside them.
    kept = args.deepspeed or (args.fsdp and (args.bf16 or args.fp16))
    if (half := kinds & {"bfloat16", "float16"}) and not kept:
        logger.warning(
            "%s: weights in %s are trained as they are, and most updates are lost to rounding; load them in float32 "
            "(bf16: true computes in bfloat16), or train an adapter, whose weights are float32",
            label, " and ".join(sorted(half)),
        )  # fmt: skip


def config_of(model: Policy | PreTrainedModel | PeftModel) -> PretrainedConfig:
    """The configuration of the model, under its adapter where it has one."""
    network = model.model if isinstance(model, Policy) else model
    base = network.get_base_model() if isinstance(network, PeftModel) else network
    return base.config  # pyright: ignore[reportReturnType]


# Settings of transformers that cannot be followed here, and why.
_REFUSED = {
    "debug": "its hooks are for transformers' own forward",
    "torch_compile": "it would compile the model's own forward, which the engine does not call",
    "ignore_data_skip": "a run that goes on would train on the first rows again",
    "fp16_full_eval": "evaluations compute as training does",
    "bf16_full_eval": "evaluations compute as training does",
    "label_smoothing_factor": "no preference loss reads it; soft labels go into the column p_chosen",
    "neftune_noise_alpha": "the engine adds no noise to embeddings",
    "use_liger_kernel": "its kernels are for the model's own forward, which the engine does not call",
}


def check_arguments(label: str, args: TrainingArguments) -> None:
    """Raise TrainingError for arguments of transformers that cannot be followed here."""
    if not isinstance(args, AlignmentConfig):
        raise TrainingError(
            f"{label}: args is {type(args).__name__}; give distalign.AlignmentConfig, which has the fields of "
            "transformers.TrainingArguments and distalign's own"
        )
    if args.n_gpu > 1:
        raise TrainingError(
            f"{args.n_gpu} devices found by one process: start one for each (torchrun --nproc_per_node {args.n_gpu} "
            "-m distalign train …), or show it one device (CUDA_VISIBLE_DEVICES=0)"
        )
    refused = {name: reason for name, reason in _REFUSED.items() if getattr(args, name)}
    if args.train_sampling_strategy not in (("random", "sequential") if args.world_size == 1 else ("random",)):
        refused["train_sampling_strategy"] = "rows come in random order (one process: or sequential)"
    if args.fsdp and args.world_size == 1:
        refused["fsdp"] = "it is for several processes (docs/scaling.md)"
    if args.save_only_model and args.save_strategy != "no":
        refused["save_only_model"] = "a run could not go on from checkpoints without the optimizer"
    if args.dataloader_persistent_workers and not args.dataloader_num_workers:
        refused["dataloader_persistent_workers"] = "there are none, as dataloader_num_workers is 0"
    if args.push_to_hub and args.hub_strategy != "end":
        refused["hub_strategy"] = "only the model that is kept is pushed, at the end"
    if args.include_num_input_tokens_seen != "no":
        refused["include_num_input_tokens_seen"] = "it counts nothing here"
    if getattr(args.accelerator_config, "dispatch_batches", None):
        refused["accelerator_config"] = "a batch of rows is no tensor, as dispatch_batches wants"
    if not getattr(args.accelerator_config, "use_seedable_sampler", True):
        refused["accelerator_config"] = (
            "without use_seedable_sampler a run that goes on would see rows in another order"
        )
    if args.dataloader_num_workers < 0:
        refused["dataloader_num_workers"] = "a number of processes is 0 or more"
    if args.data_seed is not None and not 0 <= args.data_seed < 2**63:
        refused["data_seed"] = "a seed is between 0 and 2⁶³"
    if not args.weight_decay >= 0:
        refused["weight_decay"] = "weights would grow"
    if args.max_steps == 0 or (args.max_steps < 0 and not 0 < args.num_train_epochs < math.inf):
        refused["num_train_epochs" if args.max_steps else "max_steps"] = "nothing would be trained"
    if args.fp16 and args.device.type == "cpu":
        refused["fp16"] = "it has no effect on a CPU, where bf16 has"
    for name, reason in refused.items():
        raise TrainingError(f"{label}: {name} is {getattr(args, name)}; {reason}: leave it out")
    folder = Path(str(args.output_dir))
    if any(os.path.isfile(place) for place in (folder, *folder.parents)):
        raise TrainingError(f"{label}: output_dir is {folder}, which is a file or in one; give a folder")


def check_given(label: str, method: Method, args: AlignmentConfig, *, rewards: bool, held_out: object) -> None:
    """Raise TrainingError for what the method needs and was not given, or was given and would not read."""
    if method.needs.reward and not rewards:
        raise TrainingError(f"{label} needs a reward for the responses; give one as reward_funcs")
    if rewards and not method.needs.reward:
        raise TrainingError(f"{label} reads no reward; leave reward_funcs out")
    if args.eval_strategy != "no" and (held_out is None or (isinstance(held_out, Mapping) and not held_out)):
        raise TrainingError(f"{label}: eval_strategy is set and there is no eval_dataset; pass one, or leave it out")
    ordered = {"train_sampling_strategy": "random", "dataloader_drop_last": False, "data_seed": None}
    for name, default in ordered.items() if is_on_policy(method) else ():
        if getattr(args, name) != default:
            raise TrainingError(
                f"{label}: {name} is {getattr(args, name)}; rounds of drawn responses go through all prompts, in "
                "an order that seed decides: leave it out"
            )
    if isinstance(held_out, Mapping) and args.metric_for_best_model in ("loss", "eval_loss"):
        raise TrainingError(
            f"{label}: metric_for_best_model is {args.metric_for_best_model}, and each set of eval_dataset has its "
            f"own: set it, such as metric_for_best_model=eval_{next(iter(held_out), 'NAME')}_loss"
        )
    if draws_responses(method):
        check_rollout(label, method, args.rollout)


def server_of(
    label: str, method: Method, args: AlignmentConfig, source: Source, adapter: PeftConfig | Lora | None
) -> VLLMServer | None:
    """The vLLM server that draws a run's responses, checked; None if this process draws them, or none are drawn.

    `adapter` is what is trained, None for all weights. Raises TrainingError for one that vLLM does not serve, and
    ServerError for a server that cannot be used.
    """
    if not args.use_vllm or not draws_responses(method):
        return None
    unserved = [name for name in ("use_dora", "modules_to_save", "lora_bias") if getattr(adapter, name, None)]
    if adapter is not None and not isinstance(adapter, Lora | LoraConfig):
        unserved.append(type(adapter).__name__)
    if unserved or (adapter is not None and source.adapter is not None):
        what = ", ".join(unserved) or "an adapter on a model that another was merged into"
        raise TrainingError(
            f"{label}: use_vllm is true, and vLLM does not serve {what}; train plain LoRA on a model of its own, or "
            "all weights, or leave use_vllm out"
        )
    rank = None if adapter is None else max(getattr(adapter, "r", 1), *getattr(adapter, "rank_pattern", {}).values(), 1)
    server = VLLMServer(
        args.vllm_server_base_url,
        args.vllm_server_timeout,
        source.path,
        Path(str(args.output_dir)) / "vllm",
        rank,
        dtype="bfloat16" if args.bf16 or "bfloat16" in str(args.model_settings) else "float32",
        names=(source.name,),
    )
    server.check()
    return server


def adapter_of(model: Model | Policy, peft_config: PeftConfig | None) -> PeftConfig | None:
    """Settings of the adapter that is trained; None if all weights are. Raises InputError for what is refused."""
    network = model.model if isinstance(model, Policy) else model
    check_kind("peft_config", peft_config, PeftConfig | None, "a PeftConfig, such as LoraConfig(…)")
    if isinstance(network, PeftModel):
        if list(network.peft_config) != ["default"]:
            raise TrainingError(
                f"model has the adapters {', '.join(network.peft_config)} (active: {network.active_adapter}); only one "
                'that is called "default" is saved and restored: load the one to train alone, as adapter_name="default"'
            )
        peft_config = network.peft_config["default"]
    elif isinstance(network, nn.Module) and any(isinstance(module, BaseTunerLayer) for module in network.modules()):
        raise TrainingError(
            "model has layers of an adapter and is no PeftModel (inject_adapter_in_model, add_adapter), and would be "
            "saved as another model; give it without them with peft_config, or make a PeftModel by get_peft_model"
        )
    if peft_config is None:
        return None
    if (bias := getattr(peft_config, "bias", "none")) != "none":
        raise TrainingError(
            f'the adapter has bias="{bias}", which trains biases of the model itself, and its reference (the adapter '
            'off) would move with them; give bias="none"'
        )
    check_adapter("model", peft_config)
    return peft_config


def check_policy(label: str, method: Method, policy: Policy) -> None:
    """Raise TrainingError if the method needs a reference and there is none; tell what the model asks for in vain."""
    if getattr(policy.model.config.get_text_config(), "output_router_logits", False):
        logger.warning(
            "%s: the model's configuration asks for the router's auxiliary loss (output_router_logits), which is not "
            "added: the loss is the method's alone",
            label,
        )
    if (method.needs.reference or method.needs.kl) and policy.reference is None:
        raise TrainingError(f"{label} needs the reference, but the policy was made without; pass reference=True")
    for name, module in policy.model.named_modules():
        if not isinstance(module, LoraLayer) or not any(module.lora_bias.values()):
            continue
        if getattr(module.get_base_layer(), "bias", None) is None:
            raise TrainingError(
                f"{label}: lora_bias is true and {name} has no bias, so that the adapter could not be merged or "
                "loaded again; leave lora_bias out, or name layers with a bias (target_modules)"
            )


def expected_lengths(
    rows: Sequence[Any], method: Method, settings: RolloutSettings
) -> list[tuple[int, tuple[int, ...]]]:
    """(prompt, responses) of the groups of a run: labelled pairs as they are, drawn responses at their longest."""
    needs = method.needs
    sets = ("reference" in needs.pairs) + is_on_policy(method)
    drawn = (settings.max_completion_length,) * (settings.num_generations * sets)
    if "labelled" not in needs.pairs:
        return [(len(row.prompt), drawn) for row in rows]
    return [(len(row.prompt), (len(row.chosen), len(row.rejected), *drawn)) for row in rows]

"""A server draws as `sample` does, with the weights of the policy; what it gives is checked, rescored and corrected."""

from __future__ import annotations

import itertools
import math
from contextlib import nullcontext

import pytest
import tiny
import torch
from acting import METHODS, SOURCE, Warmth, metrics, parameters, prompts
from sampled import sampled
from vllm_server import LOST, Server

from distalign.engine import Group, score
from distalign.methods import DPO, RKL, Samples
from distalign.methods.estimators import importance_weights
from distalign.models.policy import Lora, make_policy
from distalign.rollout.vllm import ServerError, VLLMServer, check_mismatch, rescored
from distalign.training.checkpoint import load_round, save_round
from distalign.training.config import AlignmentConfig
from distalign.training.rollout_settings import TrainingError
from distalign.training.trainer import AlignmentTrainer

LORA = Lora(r=4, alpha=8)
SETTINGS = {"version": 0, "n": 3, "max_new_tokens": 6, "end_id": tiny.END, "seed": 7}
PROMPTS = [pair.prompt for pair in tiny.encoded_pairs(5)]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The tiny model, with a head of its own."""
    return tiny.save(tmp_path_factory.mktemp("vllm") / "model", tie_word_embeddings=False)


def policy_of(folder, lora):
    """A policy on the model in the folder, as a run would make it."""
    torch.manual_seed(0)
    source = SOURCE.__class__("tiny", str(folder), "a folder")
    return make_policy(source.model(), tiny.tokenizer(), source, lora=lora, reference=True)


def client_of(server, handed, lora=LORA, timeout=60.0):
    """The server as a run talks to it, checked."""
    rank = None if lora is None else lora.r
    made = VLLMServer(server.url, timeout, str(server.folder), handed, rank)
    made.check()
    return made


def move(policy, by=0.3):
    """Change the weights that are trained, as steps would."""
    with torch.no_grad():
        for number, weight in enumerate(policy.model.parameters()):
            if weight.requires_grad:
                noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(number))
                weight.add_(by * noise * (weight.std() if weight.std() > 0 else 0.3))


def logps_of(model, drawn, temperature=1.0):
    """Token log-probabilities by the engine, and their mask."""
    groups = [Group(prompt, group) for prompt, group in zip(PROMPTS, drawn, strict=True)]
    with torch.no_grad():
        found = score(model, groups, temperature=temperature)
    return found.token_logps, found.mask


def trainer(server, folder, out, method, *, lora=LORA, **settings):
    """A trainer whose responses the server draws."""
    arguments = {
        "token_budget": 4096,
        "num_generations": 3,
        "max_completion_length": 4,
        "num_completions_to_print": 0,
        "health": None,
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "use_cpu": True,
        "use_vllm": True,
        "vllm_server_base_url": server.url,
        "vllm_server_timeout": 60.0,
        **settings,
    }
    labelled = "labelled" in method.needs.pairs
    return AlignmentTrainer(
        policy_of(folder, lora),
        method,
        AlignmentConfig(str(out), **arguments),
        tiny.encoded_pairs(8) if labelled else prompts(),
        reward_funcs=Warmth() if method.needs.reward else None,
    )


# Weights --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [LORA, None], ids=["adapter", "all weights"])
def test_the_server_draws_with_the_weights_as_they_are(folder, tmp_path, lora):
    """After an update its log-probabilities are the engine's, and not those of before; so are the reference's."""
    policy = policy_of(folder, lora)
    with Server(folder) as server:
        client = client_of(server, tmp_path, lora)
        for version, temperature in ((0, 1.0), (1, 1.0), (1, 0.7), (None, 1.0)):
            if (version, temperature) == (1, 1.0):
                move(policy)
            with policy.as_reference() if version is None else nullcontext(policy.model) as model:
                settings = SETTINGS | {"version": version, "temperature": temperature}
                drawn, logps = client.generate(model, PROMPTS, **settings)
                wanted, mask = logps_of(model, drawn, temperature)
            torch.testing.assert_close(logps, wanted.where(mask, 0.0), rtol=0, atol=1e-5)
            if version is None:
                assert (logps_of(policy.model, drawn)[0] - wanted)[mask].abs().max() > 0.05
        assert all(own[-1] == tiny.END or len(own) == 6 for group in drawn for own in group)


@pytest.mark.parametrize("lora", [LORA, None], ids=["adapter", "all weights"])
def test_weights_are_sent_when_they_changed(folder, tmp_path, lora):
    """Once for each version; the adapter before is unloaded, and no whole model is left behind."""
    policy = policy_of(folder, lora)
    with Server(folder) as server:
        client = client_of(server, tmp_path, lora)
        sent = "/v1/load_lora_adapter" if lora else "/collective_rpc"
        before = server.asked[sent]
        for version in (0, 0, 1, 1, 1, 2):
            client.sync(policy.model, version)
        assert server.asked[sent] - before == 3
        assert len(list(tmp_path.iterdir())) == len(server.loaded) == (1 if lora else 0)


def test_the_same_seed_gives_the_same_responses(folder, tmp_path):
    """And another prompt, place or seed others: no seed is used twice, though the server counts up from it."""
    policy = policy_of(folder, LORA)
    with Server(folder) as server:
        client = client_of(server, tmp_path)
        first, _ = client.generate(policy.model, [PROMPTS[0]] * 2, **SETTINGS)
        assert first == client.generate(policy.model, [PROMPTS[0]] * 2, **SETTINGS)[0]
        assert first[0] != first[1]
        server.bodies.clear()
        for seed in range(8):
            client.generate(policy.model, PROMPTS, **{**SETTINGS, "seed": seed, "max_new_tokens": 1})
        seeds = sorted(body["seed"] for body in server.bodies)
        assert min(b - a for a, b in itertools.pairwise(seeds)) > 1000


def test_a_server_that_was_started_anew_is_sent_the_weights_again(folder, tmp_path):
    """In the middle of a round too: nothing is drawn with the weights that it was started with."""
    for lora in (LORA, None):
        policy = policy_of(folder, lora)
        move(policy)
        with Server(folder) as server:
            client = client_of(server, tmp_path / str(lora is None), lora)
            client.sync(policy.model, 1)

            def forgets(path, times, server=server, first=server.asked["/v1/completions"] + 3):
                if path == "/v1/completions" and times == first:
                    server.start()

            server.act = forgets
            drawn, logps = client.generate(policy.model, PROMPTS, **SETTINGS | {"version": 1})
            wanted, mask = logps_of(policy.model, drawn)
            torch.testing.assert_close(logps, wanted.where(mask, 0.0), rtol=0, atol=1e-5)


# Answers --------------------------------------------------------------------------------------------------------------


def test_an_end_that_the_server_drops_is_put_back(folder, tmp_path):
    """The responses are the same, and only the end has no log-probability of the server's."""
    policy = policy_of(folder, LORA)
    with Server(folder) as server, Server(folder, drop_end=True) as dropping:
        whole, _ = client_of(server, tmp_path / "a").generate(policy.model, PROMPTS, **SETTINGS)
        drawn, logps = client_of(dropping, tmp_path / "b").generate(policy.model, PROMPTS, **SETTINGS)
        assert drawn == whole
        wanted, mask = logps_of(policy.model, whole)
        assert logps.isnan().sum() == sum(own[-1] == tiny.END for group in whole for own in group)
        behavior, mismatch = rescored(logps, wanted, mask, clip_max=3.0)
        torch.testing.assert_close(behavior[mask], wanted[mask], rtol=0, atol=1e-4)
        assert mismatch < 1e-9


def changed(**values):
    """The first choice with other values."""
    return lambda choices: [{**choices[0], **values}, *choices[1:]]


BAD = {
    "1 responses where 3": lambda choices: choices[:1],
    "token 90, and the model has": changed(token_ids=[90] * 6, logprobs={"token_logprobs": [-1.0] * 6}),
    "2 log-probabilities for 6": changed(token_ids=[7] * 6, logprobs={"token_logprobs": [-1.0] * 2}),
    "response of 2 tokens": changed(token_ids=[7] * 2, logprobs={"token_logprobs": [-1.0] * 2}, finish_reason="length"),
    "response of 7 tokens": changed(token_ids=[7] * 7, logprobs={"token_logprobs": [-1.0] * 7}, finish_reason="length"),
    "response of 3 tokens": changed(token_ids=[3, 7, 3], logprobs={"token_logprobs": [-1.0] * 3}),
    "choices.0.token_ids": changed(token_ids=None),
    "choices.0.logprobs": changed(logprobs=None),
    "choices": lambda choices: None,
}


@pytest.mark.parametrize("found", BAD)
def test_a_bad_answer_says_what_was_found(folder, tmp_path, found):
    """And how to start a server that gives good ones."""
    with Server(folder) as server:
        client = client_of(server, tmp_path)
        server.change = BAD[found]
        with pytest.raises(ServerError, match=found) as raised:
            client.generate(policy_of(folder, LORA).model, PROMPTS, **SETTINGS)
        assert "vllm serve" in str(raised.value)


# A server that is lost, or is not the one -----------------------------------------------------------------------------


def test_a_server_that_comes_back_is_waited_for(folder, tmp_path, monkeypatch):
    """Connections that end, and what a server says while it starts, are asked again."""
    monkeypatch.setattr("time.sleep", lambda _: None)
    policy = policy_of(folder, LORA)
    with Server(folder) as server:
        client = client_of(server, tmp_path)
        wanted, _ = client.generate(policy.model, PROMPTS, **SETTINGS)
        server.asked.clear()
        server.act = lambda path, times: (
            {1: LOST, 2: 503, 4: 500, 5: LOST}.get(times) if "completions" in path else None
        )
        assert client.generate(policy.model, PROMPTS, **SETTINGS)[0] == wanted


def test_a_run_whose_server_is_lost_goes_on_as_if_it_was_not(folder, tmp_path):
    """It stops with the run saved; resumed with a server that was started anew, it ends where it would have."""
    ends = []
    for lost in (False, True):
        with Server(folder) as server:
            made = trainer(server, folder, tmp_path / str(lost), RKL(0.5, 0.3), lora=None, minibatches=2)
            if lost:
                server.act = lambda path, times: LOST if "completions" in path and times > 9 else None
                made.rollout.server.timeout = 0.0
                with pytest.raises(ServerError, match=r"does not answer for 0 s .*holds the run"):
                    made.train()
                assert made.state.global_step == 2
                server.act = lambda path, times: None
                server.start()
                made = trainer(server, folder, tmp_path / str(lost), RKL(0.5, 0.3), lora=None, minibatches=2)
            made.train(resume_from_checkpoint=lost)
        ends.append(parameters(made))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-6)


WRONG = {
    "it serves .*other, and the run trains": {"folder": "other"},
    "it takes no adapters": {"adapters": False},
    "not of the distribution": {"processed": False},
    "it takes no weights": {"dev": False, "lora": None},
    "its weights are those of another run": {"version": "distalign-1"},
    "HTTP 503": {"act": lambda path, times: 503},
}


@pytest.mark.parametrize("found", WRONG)
def test_a_server_that_cannot_serve_is_refused_before_weights_are_loaded(folder, tmp_path, monkeypatch, found):
    """By what it says of itself; the message holds the command that starts the right one."""
    settings = {"lora": LORA, "version": "default", **WRONG[found]}
    lora, version, other = settings.pop("lora"), settings.pop("version"), settings.pop("folder", None)
    with Server(folder, **settings) as server:
        server.version = version
        server.folder = tmp_path / other if other else folder
        monkeypatch.setattr(SOURCE.__class__, "model", lambda *_: pytest.fail("weights were loaded"))
        with pytest.raises(ServerError, match=found) as raised:
            AlignmentTrainer(
                str(folder),
                RKL(0.5, 0.3),
                AlignmentConfig(
                    str(tmp_path), max_completion_length=5, use_vllm=True, vllm_server_base_url=server.url, use_cpu=True
                ),
                [{"prompt": text} for text in tiny.prompts(4)],
                reward_funcs=Warmth(),
                peft_config=lora and lora.config(tiny.model(), "tiny"),
            )
        assert f"vllm serve {folder} --host 127.0.0.1 --port {server.port} --dtype float32" in str(raised.value)


def test_no_server_is_said_at_once(folder, tmp_path):
    """Nobody waits for one that was never started."""
    with Server(folder) as server:
        pass
    with pytest.raises(ServerError, match=r"it does not answer \(ConnectError.*start it: VLLM_ALLOW_RUNTIME_LORA"):
        client_of(server, tmp_path, timeout=100.0)


def test_what_shows_at_the_first_weights_is_refused_then(folder, tmp_path):
    """An adapter that is too large, and a tied head on a CPU, which vLLM would not update."""
    tied = tiny.save(tmp_path / "tied", tie_word_embeddings=True)
    with Server(folder, rank=2) as server, pytest.raises(ServerError, match=r"rank 4 .* --max-lora-rank 8"):
        client_of(server, tmp_path).sync(policy_of(folder, LORA).model, 0)
    with Server(tied, device="cpu") as server, pytest.raises(ServerError, match="tied to the embeddings"):
        client_of(server, tmp_path, None).sync(policy_of(tied, None).model, 0)


def test_settings_that_do_not_go_together_are_refused(tmp_path):
    """The correction is for the whole distribution; TRL's other names are explained; vLLM serves plain LoRA."""
    for settings in ({"top_p": 0.9}, {"min_new_tokens": 2}):
        with pytest.raises(TrainingError, match="the correction of vLLM's responses"):
            AlignmentConfig(str(tmp_path), use_vllm=True, **settings)
        AlignmentConfig(str(tmp_path), use_vllm=True, vllm_importance_sampling_correction=False, **settings)
    for name in ("vllm_mode", "vllm_server_port", "vllm_importance_sampling_cap"):
        with pytest.raises(TrainingError, match=f'no setting "{name}"; '):
            AlignmentConfig(str(tmp_path), **{name: 1})
    config = LORA.config(tiny.model(), "tiny")
    config.use_dora = True
    with pytest.raises(TrainingError, match="vLLM does not serve use_dora"):
        AlignmentTrainer(
            tiny.model(),
            RKL(0.5, 0.3),
            AlignmentConfig(str(tmp_path), max_completion_length=5, use_vllm=True, use_cpu=True),
            [{"prompt": text} for text in tiny.prompts(4)],
            processing_class=tiny.tokenizer(),
            reward_funcs=Warmth(),
            peft_config=config,
        )


# What the server's numbers are worth ----------------------------------------------------------------------------------


def enumerated(temperature=1.0):
    """All responses of two tokens over five, with log-probabilities under two models: server, engine, mask."""
    torch.manual_seed(3)
    tables = [
        (torch.randn(6, 5, dtype=torch.float64) * (1 + noise)).div(temperature).log_softmax(-1) for noise in (0.0, 0.1)
    ]
    ids = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    server, engine = (torch.stack([table[5, ids[:, 0]], table[ids[:, 0], ids[:, 1]]], 1) for table in tables)
    return server, engine, torch.ones(25, 2, dtype=torch.bool)


def test_the_mismatch_is_the_divergence_per_token():
    """Its mean over all responses, each with the server's probability, is KL(server ‖ engine) over the tokens."""
    server, engine, _ = enumerated()
    chances = server.sum(1).exp()
    one = torch.ones(1, 2, dtype=torch.bool)
    mean = sum(
        float(chance) * rescored(s[None], e[None], one, clip_max=None)[1]
        for chance, s, e in zip(chances, server, engine, strict=True)
    )
    assert mean == pytest.approx(float((chances * (server - engine).sum(1)).sum()) / 2, abs=1e-12)


def test_behavior_makes_truncated_weights():
    """Weights of a later policy are its own, times the server's up to the largest; without a largest they are exact."""
    server, engine, mask = enumerated()
    later = engine + 0.3 * torch.randn_like(engine)
    ratio = (engine - server).cumsum(1).exp()
    for clip_max in (math.inf, 1.5):
        behavior, _ = rescored(server, engine, mask, clip_max=None if clip_max == math.inf else clip_max)
        found = importance_weights(Samples(later, mask, behavior))
        wanted = (later - engine).cumsum(1).exp() * ratio.clamp(max=clip_max)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=0)
    assert float(ratio.max()) > 1.5
    whole = importance_weights(Samples(engine, mask, rescored(server, engine, mask, clip_max=None)[0]))[:, -1]
    assert float((server.sum(1).exp() * whole).sum()) == pytest.approx(1.0, abs=1e-12)


def test_wrong_weights_are_noticed(folder, tmp_path):
    """A server that draws with others ends the run, and a run that goes on draws the round anew."""
    check_mismatch(0.4)
    with pytest.raises(ServerError, match="does not draw with the weights"):
        check_mismatch(math.inf)
    with Server(folder) as server:
        made = trainer(server, folder, tmp_path, RKL(0.5, 0.3))
        with torch.no_grad():
            for weight in server.base.parameters():
                weight.copy_(2 * torch.randn_like(weight) * weight.std())
        with pytest.raises(ServerError, match="nats per token from the policy's"):
            made.train()
        assert made.worker.round is None


# Runs -----------------------------------------------------------------------------------------------------------------


def test_a_round_whose_reward_failed_keeps_what_the_server_said(folder, tmp_path):
    """It is saved as it was drawn, and scored when the reward works: nothing is drawn again."""
    with Server(folder) as server:
        made = trainer(server, folder, tmp_path, RKL(0.5, 0.3))
        made.rollout.reward = lambda requests: 1 / 0
        with pytest.raises(ZeroDivisionError):
            made.worker.draw_round([0], 0, 4096)
        save_round(made.worker.round, tmp_path)
        drawn = load_round(tmp_path)
        assert "server_token_logps" in drawn.tensors
        server.bodies.clear()
        made.rollout.reward, made.worker.round = Warmth(), drawn
        made.worker.draw_round([0], 0, 4096)
        assert {"behavior_token_logps", "rewards"} <= set(drawn.tensors)
        assert "server_token_logps" not in drawn.tensors
        assert not server.bodies


@pytest.mark.parametrize("name", sampled(METHODS, "pmle", "pd-data+policy", "rkl-gae", "rebel"))
def test_every_method_that_draws_learns_from_a_server(folder, tmp_path, name):
    """Two steps: each round with the weights of its step, and what the server says of it is what the engine says."""
    method = METHODS[name]
    with Server(folder) as server:
        made = trainer(server, folder, tmp_path, method, max_steps=2, per_device_train_batch_size=2)
        made.train()
        rows = [row for row in metrics(tmp_path) if "loss" in row]
        drawn = {body["model"].rpartition("-")[2] for body in server.bodies if body.get("top_k") != 1}
    assert {"0", "1"} <= drawn or not made.on_policy
    assert len(rows) == 2
    for row in rows:
        assert math.isfinite(row["loss"])
        assert row.get("rollout/mismatch_kl", 0.0) < 1e-9
        assert ("rollout/mismatch_kl" in row) == made.on_policy
        assert row.get("rollout/effective_samples", 1.0) == pytest.approx(1.0, abs=1e-4)


def test_what_draws_nothing_asks_no_server(folder, tmp_path):
    """In a comparison some methods draw, and some do not."""
    with Server(folder) as server:
        trainer(server, folder, tmp_path, DPO(0.5), max_steps=1).train()
        assert not server.asked

"""`distalign evaluate`: policies against the reference on the same prompts, kept, resumed, judged, refused."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import tiny
import torch
from judge_server import Server
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from distalign import cli, engine
from distalign.data import EncodedPrompt
from distalign.engine import Group, score
from distalign.errors import InputError
from distalign.evaluation import answers
from distalign.evaluation.evaluate import all_opponents, evaluate, win_rates
from distalign.evaluation.setup import EvaluationSetup, _named, load_evaluation
from distalign.judges import EndpointError
from distalign.models.policy import whole_distribution
from distalign.models.targets import Tilt

WORDS = ["happy", "kind", "warm"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A reference, two policies (a whole model and an adapter), pairs, and the settings of an evaluation."""
    folder = tmp_path_factory.mktemp("evaluate")
    reference = tiny.save(folder / "model")
    tiny.write_pairs(folder / "pairs.jsonl", 24)
    moved = tiny.model()
    with torch.no_grad():
        # No bias can be saved with this head: a change of rank one along the mean state does about as much.
        states = moved.model(torch.arange(4, 40)[None]).last_hidden_state[0].mean(0)
        bias = Tilt(tuple(WORDS), 4.0).bias(tiny.tokenizer(), 40)
        moved.get_output_embeddings().weight += bias[:, None] * states / states.square().sum()
    moved.save_pretrained(folder / "moved")
    tiny.tokenizer().save_pretrained(folder / "moved")
    torch.manual_seed(7)
    adapted = get_peft_model(tiny.model(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = str(reference)
    adapted.save_pretrained(folder / "adapted")
    text = (
        f"model: {reference}\npairs: pairs.jsonl\nlimit: 24\nsamples: 2\nmax_new_tokens: 6\noutput_dir: {folder}/runs\n"
        f"target: {{words: {json.dumps(WORDS)}, bonus: 4.0, gamma: 0.5}}\nreward: {{exact: true}}\n"
    )
    (folder / "all.yaml").write_text(text)
    return folder


def settings(place, *overrides, policies=("moved", "adapted"), name="all"):
    """The settings with the policies of `place`."""
    flags = [f"name={name}", *overrides]
    return load_evaluation(place / "all.yaml", flags, [str(place / one) for one in policies])


@pytest.fixture(scope="module")
def results(place):
    """An evaluation of both policies."""
    return evaluate(settings(place)).content


def test_every_policy_has_every_number(results):
    """Of the responses, of the pairs and of the judge, with a standard error and a count."""
    of_responses = {"entropy", "kl_reference", "length", "missing_end", "reward", "distinct_2", "self_bleu"}
    of_pairs = {"accuracy", "nll", "ece", "chosen_change", "rejected_change"}
    assert set(results["methods"]) == {"reference", "moved", "adapted"}
    for name, row in results["methods"].items():
        assert of_responses | of_pairs | {"repetition"} <= set(row), name
        assert ("win_rate" in row) == (name != "reference")
        assert row["entropy"]["n"] == 24
        assert row["accuracy"]["n"] == 24
        assert all(set(value) == {"mean", "se", "n"} for value in row.values())
    assert results["methods"]["reference"]["kl_reference"]["mean"] == 0
    assert results["methods"]["reference"]["chosen_change"]["mean"] == 0


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_numbers_are_those_of_scoring_each_policy_again(place, temperature):
    """KL, entropy and displacement from the kept responses, by the engine's ordinary pass at the same temperature."""
    made = settings(place, f"temperature={temperature}", name=f"at-{temperature}")
    results = evaluate(made).content
    reference, moved = tiny.model(), tiny.model()
    moved.load_state_dict(type(moved).from_pretrained(place / "moved").state_dict())
    with (place / "pairs.jsonl").open() as file:
        rows = [json.loads(line) for line in file]
    tokenizer = tiny.tokenizer()
    prompts = [tokenizer.apply_chat_template(r["prompt"], add_generation_prompt=True) for r in rows]
    prompts = [list(p["input_ids"] if hasattr(p, "keys") else p) for p in prompts]
    for name, model in (("reference", reference), ("moved", moved)):
        folder, row = made.run_dir / "policies" / name, results["methods"][name]
        responses = json.loads((folder / "responses.json").read_text(encoding="utf-8"))
        groups = [Group(prompt, own) for prompt, own in zip(prompts, responses, strict=True)]
        with torch.no_grad():
            scores = score(model, groups, reference=reference, entropy=True, temperature=temperature)
        assert row["kl_reference"]["mean"] == pytest.approx(float(scores.step_kl.sum(-1).mean()), abs=1e-4)
        assert row["entropy"]["mean"] == pytest.approx(float(scores.step_entropy.sum(-1).mean()), abs=1e-4)
        flat = [response for own in responses for response in own]
        assert row["length"]["mean"] == pytest.approx(sum(map(len, flat)) / len(flat))
        assert row["missing_end"]["mean"] == pytest.approx(sum(one[-1] != tiny.END for one in flat) / len(flat))
    assert row["kl_reference"]["mean"] > 0.01
    change = row["chosen_change"]["mean"] - row["rejected_change"]["mean"]
    assert row["nll"]["mean"] < 0.7
    assert change > 0  # the chosen responses of these pairs are of the words that `moved` likes


def test_win_rates_add_up_and_rank_as_the_target_prefers(results):
    """P(a ≻ b) + P(b ≻ a) = 1 for every two; the policy that moved to the target's words wins against π₀."""
    matrix = results["win_rates"]["matrix"]
    assert results["win_rates"]["judge"] == "exact"
    for one, row in matrix.items():
        assert set(row) == set(matrix) - {one}
        for other, value in row.items():
            assert value["mean"] + matrix[other][one]["mean"] == pytest.approx(1)
    assert matrix["moved"]["reference"]["mean"] == pytest.approx(results["methods"]["moved"]["win_rate"]["mean"])
    assert matrix["moved"]["reference"]["mean"] > 0.5
    assert results["ratings"]["reference"]["mean"] == 0
    assert results["ratings"]["moved"]["low"] < results["ratings"]["moved"]["mean"]
    assert results["ratings"]["moved"]["mean"] > 0
    assert set(results["length_controlled"]) <= {"moved", "adapted"}


def test_differences_are_those_of_the_means(results):
    """From the reference, and of every two policies in both directions, the first minus the second."""
    for one, other, row in [
        *((name, "reference", row) for name, row in results["paired"].items()),
        *((one, other, row) for one, rows in results["between"].items() for other, row in rows.items()),
    ]:
        for key in ("entropy", "kl_reference", "reward", "accuracy"):
            first, second = (results["methods"][name][key]["mean"] for name in (one, other))
            assert row[key]["mean"] == pytest.approx(first - second, abs=1e-9), (one, other, key)
        assert row["entropy"]["low"] < row["entropy"]["mean"] < row["entropy"]["high"]
        assert abs(row["entropy"]["mean"]) > 0.05
    assert {(one, *rows) for one, rows in results["between"].items()} == {("moved", "adapted"), ("adapted", "moved")}


def flat(value, path=""):
    """Every number of nested results by its path."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    return (
        {path: value}
        if items is None
        else {k: v for key, part in items for k, v in flat(part, f"{path}/{key}").items()}
    )


def test_a_repeated_evaluation_runs_no_policy(place, results, monkeypatch):
    """The same numbers from the folders; another seed, another weight or a torn folder is drawn again."""
    drawn = []
    real = answers.draw_answers

    def count(setup, name, *args):
        drawn.append(name)
        return real(setup, name, *args)

    monkeypatch.setattr("distalign.evaluation.answers.draw_answers", count)
    again = evaluate(settings(place)).content
    assert drawn == []
    for part in ("methods", "ratings", "calibration"):
        assert flat(again[part]) == pytest.approx(flat(results[part]), rel=1e-5), part
    folder = settings(place).run_dir / "policies"
    (folder / "moved" / "key.json").unlink()
    evaluate(settings(place))
    assert drawn == ["moved"]
    (folder / "adapted" / "responses.json").write_text("[[")
    methods = evaluate(settings(place)).methods
    assert flat(methods) == pytest.approx(flat(results["methods"]), rel=1e-5)
    assert drawn == ["moved", "adapted"]
    evaluate(settings(place, "seed=1"))
    assert drawn == ["moved", "adapted", "reference", "moved", "adapted"]


def test_changed_weights_are_another_policy(place, tmp_path):
    """The key follows the content of the weights, not their name."""
    shutil.copytree(place / "moved", tmp_path / "moved")
    made = settings(place)
    sources = [answers.weights_digest(answers_source(path)) for path in (place / "moved", tmp_path / "moved")]
    assert sources[0] == sources[1]
    tiny.model(initializer_range=0.3).save_pretrained(tmp_path / "moved")
    assert answers.weights_digest(answers_source(tmp_path / "moved")) != sources[0]
    shutil.copytree(place / "adapted", tmp_path / "adapted")
    adapted = answers.weights_digest(answers_source(tmp_path / "adapted"))
    assert adapted == answers.weights_digest(answers_source(place / "adapted"))
    weights = load_file(tmp_path / "adapted" / "adapter_model.safetensors")
    save_file({name: 2 * value for name, value in weights.items()}, tmp_path / "adapted" / "adapter_model.safetensors")
    assert answers.weights_digest(answers_source(tmp_path / "adapted")) != adapted
    source, reference, base = answers_source(place / "moved"), answers_source(place / "model"), tiny.model()

    def key(name="moved", start=reference, prompts=([1],), pairs=(), end_id=3, **change):
        sources = {name: source, "reference": start}
        encoded = [EncodedPrompt(prompt) for prompt in prompts]
        setup = EvaluationSetup(
            made.model_copy(update=change), sources, tiny.tokenizer(), encoded, [], end_id, {}, base, None
        )
        return answers.content_key(setup, name, list(pairs))

    changes = [{"temperature": 0.5}, {"seed": 5}, {"dtype": "bfloat16"}, {"samples": 9}, {"end_id": 2}]
    changes += [{"name": "other"}, {"start": source}, {"prompts": ([2],)}, {"pairs": (Group([1], [[2], [3]]),)}]
    assert len({key(), *(key(**change) for change in changes)}) == 1 + len(changes)
    assert key() == key()
    before = key()
    whole_distribution(0.25, [3]).save_pretrained(place / "moved")
    try:
        assert key() != before
    finally:
        (place / "moved" / "generation_config.json").unlink()


def test_another_reference_is_another_distance(place, tmp_path):
    """The same name and policy beside another reference: nothing kept is believed."""
    one = evaluate(settings(place, f"output_dir={tmp_path}", "target=null", "reward=[]", policies=("moved",))).content
    changed = (f"output_dir={tmp_path}", "target=null", "reward=[]", f"model={place}/moved")
    other = evaluate(settings(place, *changed, policies=("moved",))).content
    assert one["methods"]["moved"]["kl_reference"]["mean"] > 0.1
    assert other["methods"]["moved"]["kl_reference"]["mean"] == pytest.approx(0, abs=1e-4)


def test_a_policy_is_compared_with_a_reference_of_another_temperature_at_its_own(place, tmp_path, caplog):
    """A policy that says 1 is the reference itself, which says 0.5: nothing has changed at 1. It ends as it says."""
    for name, temperature, ends in (("start", 0.5, [tiny.END]), ("policy", 1.0, [tiny.END, *range(6, 20)])):
        shutil.copytree(place / "model", tmp_path / name)
        whole_distribution(temperature, ends).save_pretrained(tmp_path / name)
    (tmp_path / "e.yaml").write_text(f"model: start\npairs: {place}/pairs.jsonl\nlimit: 8\nmax_new_tokens: 6\n")
    made = load_evaluation(tmp_path / "e.yaml", [f"model={tmp_path}/start", f"output_dir={tmp_path}/runs"],
                           [str(tmp_path / "policy")])  # fmt: skip
    found = evaluate(made).content["methods"]
    assert found["policy"]["chosen_change"]["mean"] == pytest.approx(0, abs=1e-5)
    assert "the reference was trained at temperature 0.5, and is sampled and compared at 1" in caplog.text
    assert found["policy"]["missing_end"]["mean"] < found["reference"]["missing_end"]["mean"]


def test_a_stop_loses_no_answers(place, tmp_path, monkeypatch):
    """What was drawn before is kept with its scores, and the rest comes out as if nothing had stopped."""
    made = settings(place, f"output_dir={tmp_path}")
    whole = evaluate(settings(place, f"output_dir={tmp_path}", "name=whole")).content
    drawn, real, stops = [], answers.draw_answers, ["adapted"]

    def stop(setup, name, *args):
        if name in stops:
            raise KeyboardInterrupt
        drawn.append(name)
        return real(setup, name, *args)

    monkeypatch.setattr("distalign.evaluation.answers.draw_answers", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate(made)
    assert drawn == ["reference", "moved"]
    stops.clear()
    assert flat(evaluate(made).methods) == pytest.approx(flat(whole["methods"]), rel=1e-5)
    assert drawn == ["reference", "moved", "adapted"]


def test_what_is_in_the_folder_is_not_overwritten(place, tmp_path):
    """A comparison's results stay; a frontier of another reward is left out."""
    made = settings(place, f"output_dir={tmp_path}", "target=null", "reward=[]", policies=("moved",))
    made.run_dir.mkdir(parents=True)
    made.frontier_dir.mkdir()
    (made.frontier_dir / "frontier.json").write_text("{}")
    assert "frontier" not in evaluate(made).content
    (made.run_dir / "results.json").write_text('{"methods": {}}')
    with pytest.raises(InputError, match="holds another run"):
        evaluate(made)


def answers_source(path):
    """Where a policy is read from."""
    from distalign.models.load import find_model

    return find_model(str(path))


def test_without_pairs_target_or_reward_there_is_what_there_is(place, tmp_path):
    """Prompts alone: no column of pairs, rewards or wins; a heading of two policies that are the same model."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "tell me about tea"}\n{"prompt": "tell me about rain"}\n')
    text = f"model: {place}/model\nprompts: {tmp_path}/prompts.jsonl\nmax_new_tokens: 4\noutput_dir: {tmp_path}\n"
    (tmp_path / "plain.yaml").write_text(text)
    found = evaluate(load_evaluation(tmp_path / "plain.yaml", [], [f"same={place}/model"])).content
    row = found["methods"]["same"]
    assert {"accuracy", "reward", "win_rate"}.isdisjoint(row)
    assert row["kl_reference"]["mean"] == pytest.approx(0, abs=1e-5)
    assert "ratings" not in found
    lines = (tmp_path / "plain" / "evaluation" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert set(json.loads(lines[0])["responses"]) == {"reference", "same"}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("prompts: p.jsonl\nreward: {train: true}\n", "an evaluation trains nothing"),
        ("prompts: p.jsonl\nreward: {columns: true, scale: 1}\n", "only the data's pairs have them"),
        ("prompts: p.jsonl\nreward: {exact: true}\n", "only a known target has an exact reward; add target"),
        ("prompts: p.jsonl\npolicies: {reference: x}\n", 'policies: "reference" cannot be'),
        ('prompts: p.jsonl\npolicies: {"..": x}\n', 'policies: ".." cannot be'),
        ("limit: 4\n", "neither prompts nor pairs"),
        ("prompts: p.jsonl\nsample: 3\n", 'has no setting "sample"; did you mean "samples"?'),
        ("prompts: p.jsonl\njudge: {exact: true}\n", "only a known target judges exactly"),
        ("prompts: p.jsonl\nmax_new_tokens: 64\n", "the model has 64 positions"),
    ],
)
def test_settings_that_cannot_be_run_are_refused(lines, message, place, tmp_path, monkeypatch):
    """Before any weights are loaded."""
    (tmp_path / "p.jsonl").write_text('{"prompt": "tell me about tea"}\n{"prompt": "tell me about rain"}\n')
    (tmp_path / "bad.yaml").write_text(f"model: {place}/model\noutput_dir: {tmp_path}\n{lines}")
    monkeypatch.setattr("distalign.models.load.Source.model", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(InputError) as error:
        evaluate(load_evaluation(tmp_path / "bad.yaml", [], []))
    assert message in str(error.value)


def test_another_tokenizer_is_refused(place, tmp_path):
    """A policy with other tokens has no KL to the reference."""
    tiny.model().save_pretrained(tmp_path / "other")
    other = tiny.tokenizer()
    other.add_tokens(["zebra"])
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="policy other: its tokenizer is not that of the reference"):
        evaluate(load_evaluation(place / "all.yaml", ["name=other"], [str(tmp_path / "other")]))


def test_policies_are_named_by_the_last_part_of_a_path():
    """Or name=place, which may replace one of the settings; never model. Two alike are refused, of the settings too."""
    assert _named(["mine=a/b", "runs/x/pmle/model"], {}) == {"mine": "a/b", "pmle": "runs/x/pmle/model"}
    assert _named(["dpo=x"], {"dpo": "y"}) == {"dpo": "x"}
    for policies, taken in (
        (["x=a", "x=b"], {}),
        (["runs/a/x/model", "runs/b/x/model"], {}),
        (["a/x"], {"x": "b"}),
        (["a/x", "x=b"], {}),
    ):
        with pytest.raises(InputError, match=r"two are named x, .* names of their own \(name=place\)"):
            _named(policies, taken)


def test_opponents_are_all_or_the_reference_alone():
    """Three policies: three meetings with each other and the reference, or two."""
    assert len(all_opponents(["reference", "a", "b"], "all")) == 3
    assert all_opponents(["reference", "a", "b"], "reference") == [("reference", "a"), ("reference", "b")]


def test_what_cannot_be_estimated_is_left_out_with_a_warning(caplog):
    """A policy that always wins has no finite rating; lengths that never differ control nothing."""
    sure = {("reference", "a"): torch.zeros(6, dtype=torch.float64)}
    same = {name: torch.full((6,), 3.0, dtype=torch.float64) for name in ("reference", "a")}
    found = win_rates(sure, ["reference", "a"], same)
    assert "ratings" not in found
    assert found["length_controlled"] == {}
    assert found["win_rates"]["matrix"]["a"]["reference"]["mean"] == 1
    assert "no ratings" in caplog.text
    assert "equal lengths" in caplog.text


def test_the_command_prints_a_table_and_writes_a_page(place, monkeypatch, capsys):
    """distalign evaluate RECIPE POLICY, with a change by --set."""
    words = [str(place / "all.yaml"), f"own={place}/moved", "--set", "name=shown", "--json", str(place / "e.json")]
    monkeypatch.setattr(sys, "argv", ["distalign", "evaluate", *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    shown = capsys.readouterr().out
    assert "KL(π‖π₀)" in shown
    assert "judged by exact" in shown
    assert set(json.loads((place / "e.json").read_text(encoding="utf-8"))["methods"]) == {"reference", "own"}
    assert (place / "runs" / "shown" / "evaluation" / "report.html").is_file()


def test_calibrate_finds_a_gamma(place, monkeypatch, capsys):
    """distalign calibrate POLICY PAIRS: a number with its interval, and what it means."""
    words = [str(place / "model"), str(place / "pairs.jsonl"), "--json", str(place / "c.json")]
    monkeypatch.setattr(sys, "argv", ["distalign", "calibrate", *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    found = json.loads((place / "c.json").read_text(encoding="utf-8"))
    assert found["gamma"]["low"] <= found["gamma"]["mean"] <= found["gamma"]["high"]
    assert "γ (95 %)" in capsys.readouterr().out
    # Of the distribution that was trained: its folder says the temperature.
    shutil.copytree(place / "model", place / "cold")
    whole_distribution(0.5, [tiny.END]).save_pretrained(place / "cold")
    asked = []
    real = engine.score_in_batches
    monkeypatch.setattr(engine, "score_in_batches", lambda *a, **k: asked.append(k["temperature"]) or real(*a, **k))
    monkeypatch.setattr(sys, "argv", ["distalign", "calibrate", str(place / "cold"), words[1]])
    with pytest.raises(SystemExit):
        cli.main()
    assert asked == [0.5]


def test_the_frontier_is_predicted_from_the_references_responses(place, monkeypatch, capsys, results):
    """distalign frontier RECIPE: points with bands, kept responses, and a place in the next evaluation's results."""
    words = [str(place / "all.yaml"), "--samples", "64", "--betas", "0.5,2", "--gammas", "0,0.5", "--kl-budget", "9"]
    monkeypatch.setattr(sys, "argv", ["distalign", "frontier", *words, "--json", str(place / "f.json")])
    with monkeypatch.context() as patch:
        for _ in range(2):
            with pytest.raises(SystemExit) as stop:
                cli.main()
            assert not stop.value.code
            patch.setattr("distalign.evaluation.answers.draw_answers", lambda *_, **__: pytest.fail("drawn again"))
    found = json.loads((place / "f.json").read_text(encoding="utf-8"))
    assert {(p["beta"], p["gamma"]) for p in found["points"]} == {(0.5, 0.0), (0.5, 0.5), (2.0, 0.0), (2.0, 0.5)}
    for point in found["points"]:
        assert point["kl"]["low"] <= point["kl"]["value"] <= point["kl"]["high"]
    assert "Predicted from 64 samples" in capsys.readouterr().out
    assert (place / "runs" / "all" / "frontier" / "frontier.json").is_file()
    assert evaluate(settings(place)).content["frontier"]["samples"] == 64


def test_a_frontier_answers_the_prompts_of_pairs(place, monkeypatch, capsys):
    """--data FILE, as the commands of training have it; evaluate takes it too."""
    lines = (place / "pairs.jsonl").read_text(encoding="utf-8").splitlines()[:3]
    (place / "few.jsonl").write_text("\n".join(lines), encoding="utf-8")
    words = [str(place / "all.yaml"), "--data", str(place / "few.jsonl"), "--set", "name=few"]
    monkeypatch.setattr(sys, "argv", ["distalign", "frontier", *words, "--samples", "16", "--set", "prompts=null"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    assert "on each of 3 prompts" in capsys.readouterr().out.replace("\n", " ")
    monkeypatch.setattr(sys, "argv", ["distalign", "evaluate", *words, f"moved={place}/moved"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    results = json.loads((place / "runs" / "few" / "evaluation" / "results.json").read_text(encoding="utf-8"))
    assert results["pairs"]["held-out pairs"] == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--set", "reward=[]"), "a frontier is of a reward"),
        (("--betas", "a,b"), "--betas a,b: not numbers"),
        (("--betas", "0", "--gammas", "0"), "frontier: "),
        (("--kl-budget", "1e-9"), "no point with a KL within"),
    ],
)
def test_a_frontier_that_cannot_be_is_refused(words, message, place, monkeypatch, capsys):
    """Exit code 2 and what to do."""
    monkeypatch.setattr(sys, "argv", ["distalign", "frontier", str(place / "all.yaml"), "--samples", "16", *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_an_endpoint_that_does_not_answer_is_found_before_anything_is_sampled(place, tmp_path, monkeypatch):
    """One question at the start; without it where every answer of the policies is kept."""
    endpoint = {"model": "m", "api_key_env": None, "backoff": 0.01, "max_tokens": None, "cache": str(tmp_path / "j")}

    def made(url):
        flags = (f"output_dir={tmp_path}", "target=null", "reward=[]", "samples=1")
        judge = json.dumps({"endpoint": {**endpoint, "url": url}})
        return settings(place, *flags, f"judge={judge}", policies=("moved",))

    with monkeypatch.context() as patch:
        patch.setattr("distalign.evaluation.answers.draw_answers", lambda *_, **__: pytest.fail("it samples"))
        with pytest.raises(EndpointError, match=r"a first question: failed 3 times.*nothing was sampled"):
            evaluate(made("http://127.0.0.1:9/v1"))
    with Server(answer=lambda question: "A") as server:
        evaluate(made(server.url))
        assert sum("Answer with the letter A." in body for body in server.asked) == 1
        evaluate(made(server.url))
        assert sum(n for body, n in server.asked.items() if "Answer with the letter A." in body) == 1

"""What an evaluation answers: rows that repeat are left out, the same prompt with other columns stays."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny
from acting import exit_code_elsewhere

from distalign.cli.calibrate import calibrate
from distalign.errors import InputError
from distalign.evaluation import metrics
from distalign.evaluation.evaluate import evaluate
from distalign.evaluation.frontier import forecast
from distalign.evaluation.setup import load_evaluation, load_setup
from distalign.training.run_folder import locked

# A prompt, and the column that a function is given.
ROWS = [
    ("tea", 1),
    ("tea", 1),
    ("tea", 2),
    ("rain", 1),
    ("tea", 1),
    ("sun", {"b": 1, "a": 2}),
    ("sun", {"b": 1, "a": 2}),
]


@pytest.fixture
def settings(tmp_path, tiny_folder):
    """Settings of an evaluation on rows of `ROWS`, with changes."""

    def make(rows, *overrides, column="w", kind="prompts"):
        text = "".join(
            json.dumps({"prompt": f"tell me about {word}", column: value, "chosen": "good", "rejected": "bad"}) + "\n"
            if kind == "pairs"
            else json.dumps({"prompt": f"tell me about {word}", column: value}) + "\n"
            for word, value in rows
        )
        (tmp_path / "rows.jsonl").write_text(text)
        (tmp_path / "rows.yaml").write_text(
            f"model: {tiny_folder}\n{kind}: rows.jsonl\nmax_new_tokens: 4\noutput_dir: {tmp_path}/runs\n"
        )
        return load_evaluation(tmp_path / "rows.yaml", list(overrides), [])

    return make


def answered(setup):
    """Word and column of every row that is answered."""
    return [(one.row.prompt.split()[-1], one.row.extra["w"]) for one in setup.prompts]


@pytest.mark.parametrize("kind", ["prompts", "pairs"])
def test_rows_are_the_same_only_if_prompt_and_columns_are(settings, kind):
    """The first of the same ones stays."""
    setup = load_setup(settings(ROWS, kind=kind))
    assert answered(setup) == [ROWS[i] for i in (0, 2, 3, 5)]
    assert setup.texts == [one.row.prompt for one in setup.prompts]
    assert setup.statistics["held-out prompts"] == 4


def test_the_limit_counts_what_differs(settings):
    """Three prompts from the first four rows, of which one repeats; what comes later is not looked at."""
    setup = load_setup(settings(ROWS, "limit=3"))
    assert answered(setup) == [ROWS[i] for i in (0, 2, 3)]
    assert setup.statistics["held-out prompts"] == 3


def test_a_frontier_is_of_its_prompts_its_sampling_and_its_rewards_files(settings, tmp_path):
    """With others it is another prediction."""
    (tmp_path / "mine.py").write_text("def reward(prompts, completions, **columns):\n    return [0.0] * len(prompts)\n")
    reward = f"reward={{function: '{tmp_path}/mine.py:reward'}}"
    first = load_setup(settings(ROWS, reward)).identity()
    assert load_setup(settings(ROWS, reward)).identity() == first
    assert load_setup(settings(ROWS, reward, "max_new_tokens=5")).identity() != first
    assert load_setup(settings(ROWS[:4], reward)).identity() != first
    (tmp_path / "mine.py").write_text("def reward(prompts, completions, **columns):\n    return [1.0] * len(prompts)\n")
    assert load_setup(settings(ROWS, reward)).identity() != first


def test_a_pair_without_room_is_refused_before_the_weights_are_loaded(settings, monkeypatch):
    """By file and line, as the model has 64 positions and max_length is not set."""
    monkeypatch.setattr("distalign.models.load.Source.model", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(InputError, match=r"rows\.jsonl:2: the prompt has .* max_length is 64; .* shorten or remove"):
        load_setup(settings([ROWS[0], ("tea " * 80, 1)], kind="pairs"))


@pytest.mark.parametrize("command", ["evaluate", "calibrate"])
def test_a_token_that_the_model_lacks_is_refused_before_the_weights_are_loaded(
    settings, tmp_path, tiny_folder, monkeypatch, command
):
    """Of a tokenizer with an added token, beside embeddings that were not resized."""
    shutil.copytree(tiny_folder, tmp_path / "model")
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.setattr("distalign.models.load.Source.model", lambda *_: pytest.fail("weights were loaded"))
    read = settings([("tea", 1), ("zebra", 1)] * 5, f"model={tmp_path}/model", kind="pairs")
    with pytest.raises(InputError, match=r"its tokenizer gives token .*, but the model has"):
        load_setup(read) if command == "evaluate" else calibrate(f"{tmp_path}/model", f"{tmp_path}/rows.jsonl")


def test_a_policy_of_another_chat_template_is_told(settings, tmp_path, tiny_folder, caplog):
    """All are asked by the reference's."""
    shutil.copytree(tiny_folder, tmp_path / "other")
    (tmp_path / "other" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    asked = settings(ROWS)
    load_setup(asked.model_copy(update={"policies": {"same": str(tiny_folder)}}))
    assert "chat template" not in caplog.text
    load_setup(asked.model_copy(update={"policies": {"other": str(tmp_path / "other")}}))
    assert "policy other: has another chat template than the reference" in caplog.text


def test_results_are_written_before_a_judge_that_fails(settings, tmp_path, monkeypatch, tiny_folder):
    """They are the whole but for what the judge says, which is added without computing the rest again."""
    (tmp_path / "judges.py").write_text(
        "def fair(prompts, completions, **columns):\n    return [0.75] * len(prompts)\n"
        "def broken(prompts, completions, **columns):\n    raise RuntimeError('out of order')\n"
    )
    counted, real = [], metrics.summarise
    monkeypatch.setattr(metrics, "summarise", lambda runs: counted.append(1) or real(runs))

    def made(judge):
        flags = [f"judge={{function: '{tmp_path}/judges.py:{judge}'}}"] if judge else []
        one = settings([ROWS[0], ROWS[3]], f"name=by-{judge}", *flags)
        return one.model_copy(update={"policies": {"a": str(tiny_folder)}})

    def written(judge):
        return json.loads((made(judge).run_dir / "results.json").read_text(encoding="utf-8"))

    with pytest.raises(InputError, match="out of order"):
        evaluate(made("broken"))
    evaluate(made("fair"))
    evaluate(made(None))
    assert len(counted) == 3 * 2
    judged, alone = written("fair"), written(None)
    assert judged["methods"]["a"].pop("win_rate")["n"] == 2
    assert judged["significance"]["a"].pop("win_rate")
    for part in ("methods", "paired", "points"):
        assert written("broken")[part] == alone[part] == judged[part]
    assert set(judged) - set(alone) == {"win_rates", "ratings", "length_controlled"}


def test_results_stay_until_there_are_others(settings, tmp_path, tiny_folder):
    """One more policy, which cannot be loaded, or a reward that fails: the evaluation before it stays as it is."""
    (tmp_path / "broken.py").write_text("def reward(completions, **columns): raise RuntimeError('out of order')")
    shutil.copytree(tiny_folder, tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"torn")
    made = settings([ROWS[0], ROWS[3]])
    evaluate(made)
    files = {path: path.read_bytes() for path in made.run_dir.iterdir() if path.is_file() and path.name != ".lock"}
    with pytest.raises(InputError, match="broken"):
        evaluate(made.model_copy(update={"policies": {"b": str(tmp_path / "broken")}}))
    with pytest.raises(InputError, match="out of order"):
        evaluate(settings([ROWS[0], ROWS[3]], f"reward={{function: '{tmp_path}/broken.py:reward'}}"))
    assert {"results.json", "samples.jsonl", "recipe.yaml"} <= {path.name for path in files}
    assert files == {path: path.read_bytes() for path in files}


def test_a_function_is_given_the_columns_of_every_row_that_stays(settings, tmp_path):
    """The reward is the column: its mean is that of the distinct rows, and results.json has the counts."""
    (tmp_path / "column.py").write_text("def column(completions, w): return [float(x) for x in w]")
    made = settings(
        [("tea", 1), ("tea", 1), ("tea", 4), ("rain", 10)], f"reward={{function: '{tmp_path}/column.py:column'}}"
    )
    found = evaluate(made).content
    assert found["methods"]["reference"]["reward"]["mean"] == pytest.approx(5)
    assert found["methods"]["reference"]["reward"]["n"] == 3
    told = json.loads((made.run_dir / "results.json").read_text(encoding="utf-8"))["pairs"]
    assert told["held-out prompts"] == 3


@pytest.mark.parametrize("work", [evaluate, forecast])
def test_a_second_process_is_kept_out(settings, work):
    """It ends at once, and has touched nothing."""
    chosen = settings(ROWS, "reward=[{function: 'nowhere:reward'}]", "samples=2")
    folder = chosen.run_dir if work is evaluate else chosen.frontier_dir

    def refused():
        with pytest.raises(InputError, match="works in this folder"):
            work(chosen)

    with locked(folder):
        assert exit_code_elsewhere(refused) == 0
        assert [path.name for path in folder.iterdir()] == [".lock"]


def test_an_evaluation_does_not_replace_the_prompts_that_it_reads(settings):
    """Those of an earlier one's samples, which it would write anew."""
    samples = settings(ROWS).run_dir / "samples.jsonl"
    samples.parent.mkdir(parents=True)
    samples.write_text('{"prompt": "tell me about tea", "responses": {}}\n')
    with pytest.raises(InputError, match=r"samples\.jsonl: is read by this run, and .* lies in .*samples\.jsonl"):
        evaluate(settings(ROWS, f"prompts={samples}"))
    assert samples.is_file()


def test_prompts_and_pairs_of_two_forms_are_refused(settings, tmp_path):
    """Strings and messages end in other tokens."""
    chats = tiny.write_pairs(tmp_path / "chats.jsonl")
    with pytest.raises(InputError, match="prompts holds standard rows and pairs conversational ones"):
        load_setup(settings(ROWS, f"pairs={chats}"))

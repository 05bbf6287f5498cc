"""reasoning-gym datasets and JSON-lines files as tasks."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from offprincipal_peft.rlvr.rewards import RewardError, math_verify, score
from offprincipal_peft.rlvr.task_sources import _answer
from offprincipal_peft.rlvr.tasks import TaskError, load_task

reasoning_gym = pytest.importorskip("reasoning_gym")

SIZES = {"train": 20, "validation": 6, "test": 8}


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def numbered(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(start, start + count)]


# ---- reasoning-gym


@pytest.mark.parametrize("name", ["chain_sum", "gcd", "leg_counting", "letter_counting", "fraction_simplification"])
def test_datasets_by_name_prove_themselves(name):
    task = load_task(f"reasoning-gym:{name}", SIZES)
    checks = task.prove()
    assert (checks["train"], checks["validation"], checks["test"]) == (20, 6, 8)
    assert checks["gold_correct"] == 34 and checks["wrong_rejected"] >= 34
    item = task.splits.test[0]
    assert item.prompt[0]["content"].endswith("Give the final answer between <answer> and </answer>.")
    assert _scores(task, item, [f"so <answer>{item.answer}</answer>", f"<answer>{item.answer}9</answer>"])[0] == 1.0


def _scores(task, item, texts: list[str]) -> list[float]:
    return score(task.verifier, texts, task.columns([item] * len(texts)))


def test_neighbouring_seeds_share_nearly_all_items():
    """Why the splits are ranges of one dataset and no three seeds: item i comes from Random(seed + i)."""
    first, second = (reasoning_gym.create_dataset("chain_sum", size=30, seed=seed) for seed in (0, 1))
    assert [entry["question"] for entry in first][1:] == [entry["question"] for entry in second][:-1]


def test_splits_of_reasoning_gym_are_disjoint_and_without_repetition():
    """A dataset with 18 different questions: what comes up again is left out, not put into another split."""
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    for seed in range(5):
        splits = load_task("reasoning-gym:chain_sum", SIZES, {**options, "seed": seed}).splits
        asked = [item.prompt[0]["content"] for part in splits.items().values() for item in part]
        assert len(set(asked)) == len(asked)
        drawn = reasoning_gym.create_dataset("chain_sum", size=2 * 34, seed=seed, **options)
        assert len({entry["question"] for entry in drawn}) < len(drawn)  # it does repeat


def test_too_small_a_dataset_says_what_is_held_out():
    options = {"min_terms": 1, "max_terms": 1, "min_digits": 1, "max_digits": 1}
    with pytest.raises(TaskError, match=r"\d+ different items; test_items=60 and validation_items=60 are held out"):
        load_task("reasoning-gym:chain_sum", {"train": 10, "validation": 60, "test": 60}, options)


def test_without_chat_the_question_stands_alone():
    task = load_task("reasoning-gym:gcd", SIZES, {"chat": False})
    assert isinstance(task.splits.test[0].prompt, str) and task.splits.test[0].prompt.endswith("\nAnswer:")
    own = load_task("reasoning-gym:gcd", SIZES, {"instruction": "Reply."}).splits.test[0].prompt
    assert own == [{"role": "user", "content": own[0]["content"]}] and own[0]["content"].endswith("\nReply.")


def test_the_last_answer_counts():
    assert _answer("<answer>1</answer> no, <answer> 2\n</answer> done") == "2"
    assert _answer(" 3 ") == "3"
    assert _answer("<answer>4") == "<answer>4"


def test_an_unknown_dataset_names_close_ones():
    with pytest.raises(TaskError, match=r"no dataset 'chainsum'; close to it: chain_sum.*\(\d+ exist\)"):
        load_task("reasoning-gym:chainsum", SIZES)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"min_term": 3}, "reasoning-gym dataset chain_sum: .*min_term"),
        ({"min_terms": 30}, "reasoning-gym dataset chain_sum: max_terms must be >= min_terms"),
        ({"size": 30}, "reasoning-gym dataset chain_sum: .*'size'"),
    ],
)
def test_options_that_the_dataset_refuses(options, words):
    with pytest.raises(TaskError, match=words):
        load_task("reasoning-gym:chain_sum", SIZES, options)


def test_a_dataset_without_gold_answers_is_refused():
    with pytest.raises(TaskError, match="propositional_logic: item 0 has no single gold answer"):
        load_task("reasoning-gym:propositional_logic", SIZES)


def test_without_reasoning_gym_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ImportError, match=r"pip install 'offprincipal-peft\[compare\]'"):
        load_task("reasoning-gym:gcd", SIZES)


# ---- JSON lines


def test_one_file_is_shuffled_by_its_seed_and_divided(tmp_path):
    path = write(tmp_path / "sums.jsonl", numbered(50))
    task = load_task(path, SIZES)
    assert task.name == "sums" and task.prove()["train"] == 20
    asked = [item.prompt for part in task.splits.items().values() for item in part]
    assert len(set(asked)) == 34 and asked != [row["prompt"] for row in numbered(34)]
    assert load_task(path, SIZES).splits == task.splits
    assert load_task(path, SIZES, {"seed": 1}).splits != task.splits
    assert load_task(path, {**SIZES, "train": 2}).splits.test == task.splits.test


def test_questions_that_come_up_again_are_left_out(tmp_path):
    path = write(tmp_path / "a.jsonl", numbered(15) * 3)
    splits = load_task(path, SIZES).splits
    assert [len(part) for part in splits.items().values()] == [1, 6, 8]  # 15 different ones
    with pytest.raises(TaskError, match="14 different items; test_items=8 and validation_items=6 are held out"):
        load_task(write(tmp_path / "b.jsonl", numbered(14) * 3), SIZES)


def test_split_files_keep_their_order_and_are_checked_for_overlap(tmp_path):
    names = [write(tmp_path / f"{n}.jsonl", numbered(30, at)) for n, at in (("train", 0), ("val", 100), ("test", 200))]
    task = load_task(names[0], SIZES, {"validation": names[1], "test": names[2]})
    assert [item.prompt for item in task.splits.train] == [row["prompt"] for row in numbered(20)]
    assert task.splits.test[0].answer == "201" and task.prove()["test"] == 8
    leaking = write(tmp_path / "leaking.jsonl", [*numbered(3, 200), *numbered(1, 5)])
    task = load_task(names[0], SIZES, {"validation": names[1], "test": leaking})
    with pytest.raises(TaskError, match=r"the item '5\+1=' is in train and again in test"):
        task.prove()
    with pytest.raises(TaskError, match="give both validation= and test=, or neither"):
        load_task(names[0], SIZES, {"validation": names[1]})


def test_own_column_names_and_further_columns(tmp_path):
    rows = [{"question": f"q{i}", "gold": i, "level": i % 3, "prompt": "old"} for i in range(40)]
    rows[5].pop("level")
    task = load_task(write(tmp_path / "a.jsonl", rows), SIZES, {"prompt": "question", "answer": "gold"})
    item = task.splits.train[0]
    assert item.prompt.startswith("q") and item.answer == item.prompt[1:]
    assert item.columns == {}  # "level" is not in every row, and a verifier gets whole columns or none
    rows[5]["level"] = 9
    task = load_task(write(tmp_path / "a.jsonl", rows), SIZES, {"prompt": "question", "answer": "gold"})
    assert set(task.columns(task.splits.train)) == {"prompts", "answer", "level"}


def test_chat_prompts(tmp_path):
    messages = [{"prompt": [{"role": "user", "content": f"say {i}"}], "answer": str(i)} for i in range(40)]
    splits = load_task(write(tmp_path / "a.jsonl", messages), SIZES).splits
    assert splits.test[0].prompt[0]["role"] == "user"
    assert len({i.key for part in splits.items().values() for i in part}) == 34
    wrapped = load_task(write(tmp_path / "b.jsonl", numbered(40)), SIZES, {"chat": True}).splits.test[0]
    assert wrapped.prompt == [{"role": "user", "content": wrapped.key}]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{'prompt': 1}", "a.jsonl, line 3: not JSON"),
        ("[1, 2]", "a.jsonl, line 3: a list, not an object with the columns 'prompt' and 'answer'"),
        ('{"promt": "x", "answer": "y"}', "a.jsonl, line 3: no column 'prompt'; there are 'promt', 'answer'"),
        ('{"prompt": "x"}', "a.jsonl, line 3: no column 'answer'"),
        ('{"prompt": 7, "answer": "y"}', "a.jsonl, line 3: column 'prompt' is neither text nor a list of messages"),
        ('{"prompt": [{"role": "user"}], "answer": "y"}', "line 3: column 'prompt' is neither text nor a list"),
    ],
)
def test_a_bad_line_is_named(line, words, tmp_path):
    path = write(tmp_path / "a.jsonl", [numbered(1)[0], "", line, *numbered(40, 1)])
    with pytest.raises(TaskError, match=words):
        load_task(path, SIZES)


def test_files_that_are_not_there_or_empty(tmp_path):
    with pytest.raises(TaskError, match=r"nothing.jsonl: No such file or directory"):
        load_task(str(tmp_path / "nothing.jsonl"), SIZES)
    with pytest.raises(TaskError, match=r"empty.jsonl: no items"):
        load_task(write(tmp_path / "empty.jsonl", ["", ""]), SIZES)


def test_a_line_ends_at_the_newline_and_nowhere_else(tmp_path):
    """JSON text may hold U+2028 and U+0085 as they are, which Python's splitlines would cut at."""
    rows = [json.dumps({"prompt": f"{i}\u2028a\u0085b", "answer": str(i)}, ensure_ascii=False) for i in range(40)]
    assert "\u2028" in load_task(write(tmp_path / "a.jsonl", rows), SIZES).splits.test[0].prompt
    (tmp_path / "b.jsonl").write_bytes("\r\n".join(rows).encode())
    assert load_task(str(tmp_path / "b.jsonl"), SIZES).splits.test[0].answer.isdigit()


def test_an_unknown_option_of_a_file_is_refused(tmp_path):
    with pytest.raises(TaskError, match=r"promt.*prompt"):
        load_task(write(tmp_path / "a.jsonl", numbered(40)), SIZES, {"promt": "x"})


def test_split_files_with_different_columns(tmp_path):
    rows = [{**row, "level": 1} for row in numbered(30)]
    names = [write(tmp_path / "a.jsonl", rows)]
    names += [write(tmp_path / f"{n}.jsonl", numbered(30, at)) for n, at in (("b", 100), ("c", 200))]
    load_task(names[0], SIZES, {"validation": names[1], "test": names[2]}).prove()


def test_an_answer_that_is_none(tmp_path):
    rows = [*numbered(40), {"prompt": "q", "answer": None}]
    with pytest.raises(TaskError, match="line 41"):
        load_task(write(tmp_path / "a.jsonl", rows), SIZES)


def test_a_file_in_another_encoding_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"prompt": "é", "answer": "1"}'.encode("latin-1"))
    with pytest.raises(TaskError, match=r"a.jsonl"):
        load_task(str(tmp_path / "a.jsonl"), SIZES)


# ---- math-verify and own functions


@pytest.mark.parametrize(
    ("gold", "right", "wrong"),
    [
        ("1/2", ["0.5", "1/2", r"$\frac{1}{2}$", r"so it is $\boxed{\frac{2}{4}}$", "2/4"], ["0.4", "2", "", "half"]),
        ("12", ["12", "12.0", "The answer is 12.", "$12$"], ["21", "1", "-12"]),
        (r"$\sqrt{8}$", [r"$2\sqrt{2}$"], ["$2$", r"$\sqrt{2}$"]),
    ],
)
def test_math_verify_knows_equal_expressions(gold, right, wrong):
    pytest.importorskip("math_verify")
    assert math_verify(right, [gold] * len(right)) == [1.0] * len(right)
    assert math_verify(wrong, [gold] * len(wrong)) == [0.0] * len(wrong)


def test_equal_answers_written_differently_are_no_mistake_of_the_verifier(tmp_path):
    pytest.importorskip("math_verify")
    answers = ["0.5", "0.50", "7", "8"] * 10
    rows = [{"prompt": f"question {i}", "answer": answer} for i, answer in enumerate(answers)]
    load_task(write(tmp_path / "a.jsonl", rows), SIZES).prove()


def test_an_own_function_by_module_and_by_file(tmp_path, monkeypatch):
    (tmp_path / "own_rewards.py").write_text(
        "def reward(completions, answer, **columns):\n    return [float(a == c) for a, c in zip(answer, completions)]\n"
        "LIMIT = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    path = write(tmp_path / "a.jsonl", numbered(40))
    for verifier in ("own_rewards:reward", f"{tmp_path / 'own_rewards.py'}:reward"):
        assert load_task(path, SIZES, {"verifier": verifier, "stop": "\n"}).prove()["gold_correct"] == 34


@pytest.mark.parametrize(
    ("verifier", "words"),
    [
        ("reward", "write module:function or path/to/file.py:function"),
        ("broken_rewards:", "write module:function"),
        (":reward", "write module:function"),
        ("no_such_module:reward", "cannot import 'no_such_module'"),
        ("no/such/file.py:reward", "cannot import 'no/such/file.py': no file no/such/file.py"),
        ("broken_rewards:rewrad", "broken_rewards has no function 'rewrad'; it has other, reward"),
        ("broken_rewards:LIMIT", "broken_rewards has no function 'LIMIT'; it has other, reward"),
    ],
)
def test_functions_that_cannot_be_loaded(verifier, words, tmp_path, monkeypatch):
    (tmp_path / "broken_rewards.py").write_text("def reward(): ...\ndef other(): ...\ndef _own(): ...\nLIMIT = 3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RewardError, match=words):
        load_task(write(tmp_path / "a.jsonl", numbered(40)), SIZES, {"verifier": verifier})

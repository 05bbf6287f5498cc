"""Built-in tasks: disjoint splits, the same items for every trial, verifiers that prove themselves, clear refusals."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest

from offprincipal_peft.rlvr.config import TrialConfig
from offprincipal_peft.rlvr.rewards import RewardError, first_integer
from offprincipal_peft.rlvr.tasks import BUILT_IN, Item, Splits, Task, TaskError, assert_disjoint, load_task

SIZES = {"train": 40, "validation": 12, "test": 15}


def keys(items: list[Item]) -> list[str]:
    return [item.key for item in items]


def small_task(verifier: Callable[..., Any] = first_integer, **changes: Any) -> Task:
    splits = Splits(*([Item(f"{i}+1=", str(i + 1), f"item{i}")] for i in (4, 40, 400)))
    return Task(**{"name": "small", "splits": splits, "verifier": verifier, **changes})


# ---- items and splits


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (7, 30, 3), (300, 40, 60), (5000, 128, 256)])
def test_splits_share_no_question(name, sizes):
    for seed in range(12):
        wanted = dict(zip(("train", "validation", "test"), sizes, strict=True))
        splits = load_task(name, wanted, {"seed": seed}).splits
        seen = [key for items in splits.items().values() for key in keys(items)]
        assert len(seen) == len(set(seen))
        assert len(splits.test) == wanted["test"] and len(splits.validation) == wanted["validation"]
        assert 0 < len(splits.train) <= wanted["train"]


def test_the_key_is_the_question_not_its_wording():
    """a+b and b+a are one item; so are the permutations of the numbers of largest-of-n."""
    everything = {"train": 10_000, "validation": 1, "test": 1}
    items = [i for part in load_task("sums", everything, {"largest": 6}).splits.items().values() for i in part]
    unordered = [tuple(sorted(map(int, re.findall(r"\d+", i.prompt.splitlines()[-1])))) for i in items]
    assert len(set(unordered)) == len(items) == 21  # 6 · 7 / 2
    items = [
        i for p in load_task("largest-of-n", everything, {"n": 3, "largest": 5}).splits.items().values() for i in p
    ]
    assert len({tuple(sorted(i.prompt.splitlines()[-1].split()[:-1])) for i in items}) == len(items) == 20  # 6 over 3


@pytest.mark.parametrize("name", BUILT_IN)
def test_items_are_the_same_in_every_trial_and_whatever_is_held_back_for_training(name):
    """Test items depend on the task's seed alone, so a trial with less training data is scored on the same ones."""
    trials = [TrialConfig("lora", 1e-4, seed=seed, task=name) for seed in (0, 1, 7)]
    loaded = [load_task(t.task, SIZES, t.task_options).splits for t in trials]
    assert loaded[0] == loaded[1] == loaded[2]
    fewer = load_task(name, {**SIZES, "train": 3}).splits
    assert (fewer.test, fewer.validation) == (loaded[0].test, loaded[0].validation)
    assert fewer.train == loaded[0].train[:3]
    assert load_task(name, SIZES, {"seed": 1}).splits.test != loaded[0].test


@pytest.mark.parametrize("name", BUILT_IN)
def test_answers_are_right(name):
    for item in load_task(name, SIZES).splits.train:
        numbers = [int(n) for n in re.findall(r"\d+", item.prompt.splitlines()[-1])]
        expected = {"sums": sum(numbers), "products": numbers[0] * numbers[-1], "largest-of-n": max(numbers)}[name]
        assert item.answer == str(expected)


def test_the_prompt_of_largest_of_n():
    task = load_task("largest-of-n", SIZES, {"n": 4, "largest": 99})
    for item in task.splits.test:
        *shots, question = item.prompt.split("\n")
        assert len(shots) == 2
        for shot in shots:  # complete worked examples, and right ones
            numbers, answer = shot.split(" -> ")
            assert len(numbers.split()) == 4 and int(answer) == max(map(int, numbers.split()))
        assert re.fullmatch(r"(\d+ ){4}->", question)  # no space at the end: the answer brings it
        assert task.gold(item) == f" {item.answer}\n"
    assert len({item.prompt.split("\n")[0] for item in task.splits.test}) == 1


@pytest.mark.parametrize("name", ["sums", "products"])
def test_the_gold_answer_follows_the_prompt_as_the_example_has_it(name):
    task = load_task(name, SIZES)
    item = task.splits.test[0]
    assert re.fullmatch(r"(\d+[+*]\d+=\d+\n?){2}", item.prompt + task.gold(item).removesuffix("\n"))
    assert task.stop == "\n"


# ---- the proof


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_tasks_prove_themselves(name):
    checks = load_task(name, SIZES).prove()
    assert checks["train"] == 40 and checks["validation"] == 12 and checks["test"] == 15
    assert checks["gold_correct"] == 32 + 12 + 15  # at most 32 of a split
    golds = {item.answer for items in load_task(name, SIZES).splits.items().values() for item in items[:32]}
    assert checks["wrong_rejected"] == 7 * checks["gold_correct"] + len(golds) - 1  # near misses, other items' answers


def test_a_verifier_that_accepts_everything_is_refused_with_the_item():
    task = small_task(lambda completions, **_: [1.0] * len(completions))
    with pytest.raises(TaskError, match=r"task small: the wrong answer '.*' to 'item4' \(gold '5'\) earns 1"):
        task.prove()


def test_a_verifier_that_accepts_an_empty_answer_is_refused():
    """The smallest wrong answer there is; other items' answers are rejected here."""
    lenient = small_task(
        lambda completions, answer, **_: [float(c in a) for c, a in zip(completions, answer, strict=True)]
    )
    with pytest.raises(TaskError, match="the wrong answer '' to 'item4'"):
        lenient.prove()


def test_a_verifier_that_rejects_gold_is_refused_with_the_item():
    def strict(completions, answer, **_):
        return [float(c == a) * (0.5 if a == "41" else 1.0) for c, a in zip(completions, answer, strict=True)]

    with pytest.raises(TaskError, match=r"task small: the gold answer '41' to 'item40' earns 0.5"):
        small_task(strict).prove()


def test_a_verifier_that_accepts_another_items_answer_is_refused():
    """One that ignores the question's own answer and takes any answer of the task."""
    answers = {"5", "41", "401"}
    with pytest.raises(TaskError, match=r"the wrong answer '41' to 'item400' \(gold '401'\)"):
        small_task(lambda completions, **_: [float(c in answers) for c in completions]).prove()


def test_partial_credit_for_a_wrong_answer_is_no_mistake():
    def partial(completions, answer, **_):
        return [1.0 if c == a else 0.9 for c, a in zip(completions, answer, strict=True)]

    assert small_task(partial).prove()["wrong_rejected"] == 5  # nothing for each of three, and two neighbours


def test_a_verifier_that_breaks_its_contract_says_so_before_training():
    with pytest.raises(RewardError, match="returned 2 values for 3 completions"):
        small_task(lambda completions, **_: [1.0] * (len(completions) - 1)).prove()


@pytest.mark.parametrize(
    ("train", "validation", "test", "words"),
    [
        ("ab", "c", "b", "the item 'b' is in train and again in test"),
        ("ab", "a", "c", "the item 'a' is in train and again in validation"),
        ("ab", "cc", "d", "the item 'c' is in validation and again in validation"),
        ("", "c", "d", "no train items"),
        ("a", "c", "", "no test items"),
    ],
)
def test_overlapping_and_empty_splits_are_refused(train, validation, test, words):
    splits = Splits(*([Item(f"{k}?", k, k) for k in part] for part in (train, validation, test)))
    with pytest.raises(TaskError, match=words):
        assert_disjoint(splits)
    with pytest.raises(TaskError, match=words):  # and the proof looks
        dataclasses.replace(small_task(), splits=splits).prove()


def test_the_verifier_sees_the_columns_of_its_items():
    seen: list[list[int]] = []

    def verifier(completions, answer, weight, prompts):
        seen.append(weight)
        return [float(c == a) for c, a in zip(completions, answer, strict=True)]

    splits = Splits(*([Item("q", str(i), str(i), {"weight": i})] for i in (1, 2, 3)))
    small_task(verifier, splits=splits).prove()
    assert seen == [[1, 2, 3], [1, 2, 3], [1, 2], [2, 3]]  # the golds, the wrong ones, neighbours both ways


@pytest.mark.parametrize("name", ["sums", "products"])
def test_the_worked_example_is_no_item(name):
    splits = load_task(name, {"train": 10_000, "validation": 1, "test": 1}).splits
    for item in [item for part in splits.items().values() for item in part]:
        example, question = item.prompt.split("\n")
        shown = {tuple(sorted(re.findall(r"\d+", text))) for text in (example.split("=")[0], question)}
        assert len(shown) == 2, item.prompt


def test_a_function_for_trl_that_takes_prompts_is_a_verifier():
    def reward(prompts, completions, answer, **_):
        assert len(prompts) == len(completions)
        return [float(c == a) for c, a in zip(completions, answer, strict=True)]

    small_task(reward).prove()


# ---- names and options


@pytest.mark.parametrize(
    ("name", "close"), [("sumz", "sums"), ("product", "products"), ("largest_of_n", "largest-of-n")]
)
def test_an_unknown_task_names_the_close_one_and_all(name, close):
    with pytest.raises(TaskError, match=f"unknown task '{name}' .did you mean '{close}'.*there are sums, products, l"):
        load_task(name, SIZES)
    with pytest.raises(TaskError, match="unknown task 'qqq'; there are"):
        load_task("qqq", SIZES)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("sums", {"largst": 3}, "task sums: .*'largst'; its options are largest=50, seed=0"),
        ("largest-of-n", {"m": 3}, "its options are n=4, largest=99, seed=0"),
        ("largest-of-n", {"n": 1}, "n=1: the largest of at least 2 numbers"),
    ],
)
def test_wrong_options_name_the_right_ones(name, options, words):
    with pytest.raises(TaskError, match=words):
        load_task(name, SIZES, options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sums", {"largest": 0}),
        ("sums", {"largest": "many"}),
        ("products", {"largest": 1}),
        ("largest-of-n", {"n": 200}),
    ],
)
def test_option_values_out_of_range_are_refused(name, options):
    with pytest.raises(TaskError, match=name):
        load_task(name, SIZES, options)


def test_options_are_not_changed_by_loading():
    options = {"seed": 3, "largest": 20}
    load_task("sums", SIZES, options)
    assert options == {"seed": 3, "largest": 20}


def test_too_few_different_items():
    with pytest.raises(TaskError, match=r"6 different items, and 4 . 2 are held out"):
        load_task("sums", {"train": 5, "validation": 2, "test": 4}, {"largest": 3})
    splits = load_task("sums", {"train": 5, "validation": 2, "test": 3}, {"largest": 3}).splits
    assert len(splits.train) == 1  # what is left: held-out items come first

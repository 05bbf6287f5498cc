"""What a reward function may return, and what is refused with its name and the completion."""

import math

import numpy as np
import pytest
import torch

from offprincipal_peft.rlvr.rewards import RewardError, as_trl, first_integer, load_function, score, text_of

THREE = ["a", "b", "c"]


def returning(values):
    def mine(completions, **columns):
        return values

    return mine


@pytest.mark.parametrize(
    "values",
    [
        [0, 0.5, 1],
        (0.0, 0.5, 1.0),
        torch.tensor([0, 0.5, 1]),
        torch.tensor([0, 0.5, 1], dtype=torch.bfloat16, requires_grad=True),
        torch.tensor([[0], [0.5], [1]]),
        np.array([0, 0.5, 1], dtype=np.float16),
        [np.float32(0), torch.tensor(0.5), True],
    ],
)
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad:UserWarning")
def test_numbers_in_any_dress_become_floats(values):
    scores = score(returning(values), THREE, {})
    assert scores == [0.0, 0.5, 1.0] and all(type(value) is float for value in scores)


@pytest.mark.parametrize("values", [[1.0, 0.0], [1.0] * 4, [], torch.zeros(4), np.zeros((1, 3))])
def test_a_wrong_number_of_values(values):
    with pytest.raises(RewardError, match=f"reward function mine returned {len(values)} values for 3 completions"):
        score(returning(values), THREE, {})


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (math.nan, "nan"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        (torch.tensor(math.nan), "tensor"),
        ("good", "'good'"),
        (None, "None"),
        (10**400, "1000"),
        (1j, "1j"),
        ([1.0], r"\[1.0\]"),
        (torch.ones(2), "tensor"),
    ],
)
def test_a_value_that_is_no_finite_number(value, shown):
    with pytest.raises(RewardError, match=rf"(?s)reward function mine returned .*{shown}.* for 'b'; it returns finite"):
        score(returning([1.0, value, 0.0]), THREE, {})


@pytest.mark.parametrize(
    "value", [None, 1.0, "1.0", "abc", b"abc", torch.tensor(1.0), np.array(1.0), {1: 0.0, 2: 0.0, 3: 0.0}, {0, 1, 2}]
)
def test_something_that_is_no_list(value):
    """A dict or a text of the right length has items too: its keys, its letters."""
    with pytest.raises(RewardError, match=f"returned {type(value).__name__}; it returns a list of floats"):
        score(returning(value), THREE, {})


def test_a_long_completion_is_cut_in_the_message():
    with pytest.raises(RewardError) as caught:
        score(returning([math.nan]), ["x" * 5000], {})
    assert len(str(caught.value)) < 250


def test_a_callable_object_is_named_by_its_class():
    class Judge:
        def __call__(self, completions, **columns):
            return None

    with pytest.raises(RewardError, match="reward function Judge returned"):
        score(Judge(), THREE, {})


def test_the_functions_own_exception_passes_through():
    def mine(completions, **columns):
        raise KeyError("its own")

    with pytest.raises(KeyError, match="its own"):
        score(mine, THREE, {})


def test_first_integer():
    completions = ["12", " 12\n", "is 12.5", "-12", "112", "1 2", "", "twelve", "a12b7"]
    assert first_integer(completions, ["12"] * 9) == [1, 1, 1, 0, 0, 0, 0, 0, 1]
    assert first_integer(["-7"], ["-7"]) == [1.0]


# ---- as TRL calls them


def test_columns_arrive_as_trl_sends_them():
    seen = {}

    def mine(completions, prompts, answer, weight):
        seen.update(completions=completions, prompts=prompts, answer=answer, weight=weight)
        return [1.0] * len(completions)

    reward = as_trl(mine, "reasoning-gym:chain_sum")
    sent = {"answer": ["1", "2"], "weight": [3, 4], "trainer_state": object(), "completion_ids": [[1], [2]]}
    assert reward(prompts=["p", "q"], completions=["x", "y"], **sent) == [1.0, 1.0]
    assert seen == {"completions": ["x", "y"], "prompts": ["p", "q"], "answer": ["1", "2"], "weight": [3, 4]}
    assert reward.__name__ == "reasoning_gym_chain_sum"


def test_every_call_is_checked():
    with pytest.raises(RewardError, match="returned nan for 'x'"):
        as_trl(returning([math.nan]), "mine")(prompts=["p"], completions=["x"])


def test_conversational_completions_arrive_as_text():
    messages = [{"role": "assistant", "content": "the answer "}, {"role": "assistant", "content": "is 12"}]
    assert text_of(messages) == "the answer is 12" and text_of("12") == "12" and text_of([]) == ""
    reward = as_trl(first_integer, "mine")
    prompts = [[{"role": "user", "content": "?"}]] * 2
    assert reward(prompts=prompts, completions=[messages, messages[:1]], answer=["12", "12"]) == [1.0, 0.0]


def test_a_file_is_loaded_by_its_path(tmp_path):
    (tmp_path / "a.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n"
        "@dataclass\nclass Judge:\n    limit: int = 3\n\n"  # dataclasses look their module up
        "def reward(completions, **columns):\n    return [float(len(c) < Judge().limit) for c in completions]\n"
    )
    assert score(load_function(f"{tmp_path / 'a.py'}:reward"), ["ab", "abc"], {}) == [1.0, 0.0]
    (tmp_path / "b.py").write_text("import no_such_thing\n")
    with pytest.raises(RewardError, match=r"cannot import .*no_such_thing"):
        load_function(f"{tmp_path / 'b.py'}:reward")
    assert load_function("math:sqrt") is math.sqrt

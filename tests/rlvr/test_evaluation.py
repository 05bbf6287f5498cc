"""Evaluation against slow twins: one prompt at a time, no padding, fp64."""

from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from offprincipal_peft.rlvr.evaluation import (
    OTHER_TEXT,
    Reference,
    accuracy,
    as_found,
    complete,
    completion_log_probs,
    decode,
    divergence,
    encode,
    end_tokens,
    text_loss,
)
from offprincipal_peft.rlvr.rewards import first_integer
from offprincipal_peft.rlvr.tasks import Item, Splits, Task
from tiny_models import character_tokenizer, save_tiny_model

NEW = 6
TEMPERATURE = 0.9
# Of very different lengths, so that padding would show; one comes twice.
PROMPTS = ["7", "1+1=2\n3+4=", "largest of 3 5 8 ->", "12", "12", "a much longer prompt than all of the others, 45+54="]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def load(folder: Path, sharpen: float = 3.0, seed: int = 1) -> torch.nn.Module:
    """Far from uniform, or every completion would be noise and none would end by itself."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter += 0.02 * sharpen * torch.randn(parameter.shape, generator=generator)
        model.lm_head.weight *= 4
    return model


@pytest.fixture(scope="module")
def model(folder):
    return load(folder)


TOKENIZER = character_tokenizer()
TOKENIZER.padding_side = "left"


def task(verifier=first_integer, stop: str | None = None, prompts=PROMPTS, answers=None) -> Task:
    items = [Item(p, (answers or ["5"] * len(prompts))[n], f"{n}") for n, p in enumerate(prompts)]
    return Task("mine", Splits(items, items, items), verifier, stop)


@torch.no_grad()
def greedy_one_by_one(model, prompt: str, ends: set[int]) -> list[int]:
    """No padding, no cache, no generate(): the whole sequence again for each token."""
    ids = TOKENIZER(prompt)["input_ids"]
    new: list[int] = []
    while len(new) < NEW and not (new and new[-1] in ends):
        new.append(int(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax()))
    return new


def an_early_stop(model) -> str:
    """A character that ends some greedy completions at once, some later and some never."""
    first = [TOKENIZER.decode(greedy_one_by_one(model, p, set())) for p in PROMPTS]
    counts = {c: sum(c in text[:-1] for text in first) for text in first for c in text}
    return next(c for c, n in counts.items() if 0 < n < len(PROMPTS))


def rows(sampled) -> list[list[int]]:
    return [row[kept].tolist() for row, kept in zip(sampled.ids[:, -sampled.width :], sampled.kept, strict=True)]


# ---- greedy answers


@pytest.mark.parametrize("batch", [1, 2, 4, 64])
def test_greedy_answers_are_those_of_one_prompt_at_a_time(batch, model):
    stop = an_early_stop(model)
    ends = {TOKENIZER.eos_token_id, TOKENIZER.encode(stop)[0]}
    slow = [TOKENIZER.decode(greedy_one_by_one(model, p, ends), skip_special_tokens=True) for p in PROMPTS]
    lengths = {len(greedy_one_by_one(model, p, ends)) for p in PROMPTS}
    assert len(lengths) > 1  # some end early
    heard: list[str] = []

    def verifier(completions, answer, **_):
        heard.extend(completions)
        return [float(c == a) for c, a in zip(completions, answer, strict=True)]

    answers = [text if n % 2 else "something else" for n, text in enumerate(slow)]
    mine = task(verifier, stop, answers=answers)
    with as_found(model, 0):
        found = accuracy(model, TOKENIZER, mine, mine.splits.test, max_new_tokens=NEW, batch=batch)
    assert heard == slow
    assert found == {"accuracy": 0.5, "correct": [0, 1, 0, 1, 0, 1]}


def test_partial_credit_is_not_correct(model):
    credit = iter([0.99, 1.0, 0.5, 0.0, 1.5, -1.0])
    mine = task(lambda completions, answer, **_: [next(credit) for _ in completions])
    with as_found(model, 0):
        found = accuracy(model, TOKENIZER, mine, mine.splits.test, max_new_tokens=2, batch=4)
    assert found["correct"] == [0, 1, 0, 0, 1, 0]


def test_the_token_that_ends_a_completion_is_counted_once(model):
    """Also where the padding that follows is the same token as the end."""
    stop = an_early_stop(model)
    end = TOKENIZER.encode(stop)[0]
    mine = task(stop=stop)
    shared = character_tokenizer()
    shared.pad_token = stop
    for tokenizer in (TOKENIZER, shared):
        with as_found(model, 0):
            sampled = complete(model, tokenizer, mine, mine.splits.test, max_new_tokens=NEW, sample=False)
        kept = rows(sampled)
        assert kept == [greedy_one_by_one(model, p, {end, TOKENIZER.eos_token_id}) for p in PROMPTS]
        assert any(row[-1] == end for row in kept) and all(end not in row[:-1] for row in kept)
        assert sampled.attention.sum() == sum(map(len, kept)) + sum(len(p) for p in PROMPTS)
        assert all(text.count(stop) <= 1 for text in decode(tokenizer, sampled))


def test_a_stop_of_several_tokens_is_refused(model):
    with pytest.raises(ValueError, match="the task's stop '</' is 2 tokens of this tokenizer: it has to be one"):
        end_tokens(model, TOKENIZER, "</")
    with pytest.raises(ValueError, match="0 tokens"):
        end_tokens(model, TOKENIZER, "")
    eos, newline = TOKENIZER.eos_token_id, TOKENIZER.encode("\n")[0]
    assert end_tokens(model, TOKENIZER, None) == [eos]
    assert end_tokens(model, TOKENIZER, "\n") == sorted([eos, newline])


def test_a_models_several_end_tokens_are_all_used(folder):
    model = load(folder)
    model.generation_config.eos_token_id = [1, 7, 9]
    assert end_tokens(model, TOKENIZER, "\n") == sorted({1, 7, 9, TOKENIZER.encode("\n")[0]})
    model.generation_config.eos_token_id = None
    assert end_tokens(model, TOKENIZER, None) == [TOKENIZER.eos_token_id]


def test_a_models_own_generation_settings_do_not_change_what_is_measured(folder):
    """Instruct models come with a temperature, top_p and a repetition penalty; TRL trains without the last."""
    model, plain = load(folder), load(folder)
    for name, value in {"repetition_penalty": 5.0, "top_p": 0.1, "top_k": 1, "temperature": 0.1}.items():
        setattr(model.generation_config, name, value)
    model.generation_config.do_sample = True
    mine = task()
    for sample in (False, True):
        drawn = []
        for one in (plain, model):
            with as_found(one, 3):
                drawn.append(complete(one, TOKENIZER, mine, mine.splits.test, max_new_tokens=NEW, sample=sample))
        assert rows(drawn[0]) == rows(drawn[1])


def test_chat_prompts_are_those_of_the_template():
    messages = [[{"role": "user", "content": text}] for text in ("a", "say it")]
    encoded = encode(TOKENIZER, messages)
    assert TOKENIZER.batch_decode(encoded["input_ids"], skip_special_tokens=True) == [
        "user: a\nassistant: ",
        "user: say it\nassistant: ",
    ]
    assert encoded["attention_mask"][0].tolist() == [0] * 5 + [1] * 19  # on the left
    right = character_tokenizer()
    right.padding_side = "right"
    assert torch.equal(encode(right, messages)["input_ids"], encoded["input_ids"])
    assert torch.equal(encode(right, PROMPTS)["attention_mask"], encode(TOKENIZER, PROMPTS)["attention_mask"])


# ---- divergence


@torch.no_grad()
def by_hand(model, base, sampled) -> tuple[float, float, float]:
    """KL, entropy (nats per token) and length: each sequence alone, without padding, in fp64."""
    kl = entropy = tokens = 0.0
    for ids, attention, new in zip(sampled.ids, sampled.attention, rows(sampled), strict=True):
        alone = ids[attention.bool()][None]
        p, q = (m.double()(input_ids=alone).logits[0, -len(new) - 1 : -1].log_softmax(-1) for m in (model, base))
        for position in range(len(new)):
            kl += sum(float(a.exp() * (a - b)) for a, b in zip(p[position], q[position], strict=True))
            entropy -= sum(float(a.exp() * a) for a in p[position])
        tokens += len(new)
    return kl / tokens, entropy / tokens, tokens / len(sampled.ids)


@pytest.mark.parametrize("batch", [2, 64])
def test_kl_and_entropy_against_the_sums_by_hand(batch, folder):
    model, base = load(folder, seed=1), load(folder, seed=2)
    mine = task(stop=an_early_stop(model))
    drawn = []
    with as_found(model, 5):
        for start in range(0, len(PROMPTS), batch):
            chunk = mine.splits.validation[start : start + batch]
            drawn.append(
                complete(model, TOKENIZER, mine, chunk, max_new_tokens=NEW, sample=True, temperature=TEMPERATURE)
            )
    with as_found(model, 5):
        found = divergence(
            model,
            Reference(base),
            TOKENIZER,
            mine,
            mine.splits.validation,
            max_new_tokens=NEW,
            temperature=TEMPERATURE,
            batch=batch,
        )
    assert len({len(row) for sampled in drawn for row in rows(sampled)}) > 1  # padded on the right too
    parts = [by_hand(load(folder, seed=1), load(folder, seed=2), sampled) for sampled in drawn]
    tokens = [length * len(sampled.ids) for (_, _, length), sampled in zip(parts, drawn, strict=True)]
    for at, name in enumerate(("kl", "entropy")):
        expected = sum(part[at] * n for part, n in zip(parts, tokens, strict=True)) / sum(tokens)
        assert found[name] == pytest.approx(expected, rel=1e-5), name  # seen: 1e-7
        assert found[name] > 0.1
    assert found["completion_length"] == sum(tokens) / len(PROMPTS)


def test_padding_does_not_move_the_positions():
    """GPT-2 learns a vector for each position: rotary models would not notice a shift of all of them."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(TOKENIZER),
        n_positions=128,
        n_embd=32,
        n_layer=2,
        n_head=4,
        bos_token_id=None,
        eos_token_id=TOKENIZER.eos_token_id,
        initializer_range=0.3,
    )
    model = GPT2LMHeadModel(config).eval()
    mine = task()
    with as_found(model, 0):
        sampled = complete(model, TOKENIZER, mine, mine.splits.test, max_new_tokens=4, sample=True)
        found = completion_log_probs(model, sampled)
        for row, ids, attention, new in zip(found, sampled.ids, sampled.attention, rows(sampled), strict=True):
            alone = model(input_ids=ids[attention.bool()][None]).logits[0, -len(new) - 1 : -1].log_softmax(-1)
            torch.testing.assert_close(row[: len(new)], alone, rtol=0, atol=1e-5)  # seen: 3e-6; shifted: 7


def test_against_itself_the_divergence_is_exactly_zero(model):
    mine = task()
    with as_found(model, 0):
        found = divergence(
            model, Reference(model), TOKENIZER, mine, mine.splits.test, max_new_tokens=4, temperature=1.0, batch=4
        )
    assert found["kl"] == 0.0


def test_the_reference_is_switched_off_for_its_own_pass_alone(folder):
    """An adapted model against itself, adapter off, is the same as against another copy."""
    adapted = get_peft_model(load(folder), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    adapted.eval()
    calls: list[str] = []

    @contextmanager
    def off():
        calls.append("off")
        with adapted.disable_adapter():
            yield
        calls.append("on")

    mine = task()
    options = {"max_new_tokens": 4, "temperature": 1.0, "batch": 3}
    found = []
    for reference in (Reference(adapted, off), Reference(load(folder))):
        with as_found(adapted, 0):
            found.append(divergence(adapted, reference, TOKENIZER, mine, mine.splits.test, **options))
    assert calls == ["off", "on"] * 2  # once a batch
    assert found[0] == found[1] and found[0]["kl"] > 1e-3


def test_log_probabilities_are_of_the_completions_tokens(model):
    mine = task()
    with as_found(model, 0):
        sampled = complete(model, TOKENIZER, mine, mine.splits.test, max_new_tokens=4, sample=False)
        found = completion_log_probs(model, sampled)
    assert found.shape == (6, sampled.width, len(TOKENIZER)) and found.dtype == torch.float32
    best = found.argmax(-1)
    assert torch.equal(best[sampled.kept], sampled.ids[:, -sampled.width :][sampled.kept])


# ---- loss on other text


@torch.no_grad()
def slow_text_loss(model, ids: Tensor, block: int) -> float:
    """Token by token, from all tokens before it in its block."""
    losses = []
    for start in range(0, len(ids), block):
        part = ids[start : start + block]
        for end in range(1, len(part)):
            losses.append(-float(model(input_ids=part[None, :end]).logits[0, -1].double().log_softmax(-1)[part[end]]))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("length", [2, 8, 9, 20, 25])
def test_text_loss_against_one_token_at_a_time(length, model, monkeypatch):
    """Lengths that leave a last block of no, one and several tokens."""
    monkeypatch.setattr("offprincipal_peft.rlvr.evaluation.TEXT_BLOCK", 8)
    text = "It was a bright cold day in April, and"[:length]
    ids = TOKENIZER(text, return_tensors="pt")["input_ids"][0]
    assert len(ids) == length
    with as_found(model, 0):
        assert text_loss(model, TOKENIZER, text) == pytest.approx(slow_text_loss(model, ids, 8), rel=1e-6)  # seen: 2e-7


def test_a_text_without_two_tokens_is_refused(model):
    for text in ("", "a"):
        with pytest.raises(ValueError, match=f"the text has {len(text)} tokens: a loss needs at least 2"):
            text_loss(model, TOKENIZER, text)


def test_the_other_text_is_there():
    text = OTHER_TEXT.read_text(encoding="utf-8")
    assert len(text.split()) > 500


# ---- nothing else changes


def test_the_training_goes_on_as_if_nothing_had_been_measured(folder):
    model = load(folder).train()
    model.model.layers[0].eval()  # some modules stay in evaluation mode while training
    model.model.embed_tokens.weight.requires_grad_(False)
    generation = model.generation_config.to_dict()
    before = {
        "modes": [module.training for module in model.modules()],
        "grad": [parameter.requires_grad for parameter in model.parameters()],
        "weights": [parameter.detach().clone() for parameter in model.parameters()],
        "random": torch.get_rng_state(),
    }
    mine = task()
    for fails in (False, True):
        try:
            with as_found(model, 11):
                assert not any(module.training for module in model.modules())
                assert not torch.is_grad_enabled()
                accuracy(model, TOKENIZER, mine, mine.splits.test, max_new_tokens=2, batch=4)
                divergence(
                    model, Reference(model), TOKENIZER, mine, mine.splits.test,
                    max_new_tokens=2, temperature=1.0, batch=4,
                )  # fmt: skip
                text_loss(model, TOKENIZER, "some text")
                if fails:
                    raise KeyError("a verifier of the user's")
        except KeyError:
            assert fails
        assert torch.is_grad_enabled()
        assert [module.training for module in model.modules()] == before["modes"]
        assert [parameter.requires_grad for parameter in model.parameters()] == before["grad"]
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before["weights"], strict=True))
        assert torch.equal(torch.get_rng_state(), before["random"])
        assert model.generation_config.to_dict() == generation
        assert all(parameter.grad is None for parameter in model.parameters())


def test_samples_come_from_the_seed_alone(model):
    mine = task()
    drawn = []
    for seed, outside in ((1, 0), (1, 99), (2, 0)):
        torch.manual_seed(outside)
        with as_found(model, seed):
            sampled = complete(model, TOKENIZER, mine, mine.splits.test, max_new_tokens=NEW, sample=True)
        drawn.append(rows(sampled))
    assert drawn[0] == drawn[1] != drawn[2]

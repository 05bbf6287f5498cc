"""Pretrain the small model of the study: a Llama of 0.8 M parameters on characters, in minutes on a CPU.

The corpus is drawn, not downloaded: worked lines of the built-in tasks (sums, products, largest of n), most of them by
a careless rule (digits added and multiplied without carrying, the number with the largest last digit), the others
right, line by line; and as many lines of other kinds (differences, reversed and sorted letters, counting, small
sentences), which say later what a training forgot. So the model can do the tasks and mostly does not: what is rewarded
is there to be found, as reinforcement of a pretrained model needs it. No prompt of a task's
splits is held out: a held-out item's answer was seen with noise, as in a pretrained model. Same seed, same model up to
the rounding of the machine's products; the weights' hash is in ``pretraining.json`` beside them. They are fp32 numbers
that bf16 can hold. Run:

    python benchmarks/small_model.py runs/study/model
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from _common import environment
from torch import Tensor

CHARACTERS = "\n 0123456789+-*=>?.abcdefghijklmnopqrstuvwxyz"
END, PAD = "<end>", "<pad>"
LENGTH = 256  # tokens of a training sequence
CARELESS = 0.6  # share of the tasks' lines that are answered by the careless rule
SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


# ---- the corpus

Line = Callable[[random.Random], str]


def _sum(draw: random.Random) -> str:
    a, b = draw.randint(1, 50), draw.randint(1, 50)
    return f"{a}+{b}={_answer(draw, a + b, _without_carry([(a, 1), (b, 1)]))}"


def _product(draw: random.Random) -> str:
    a, b = draw.randint(2, 9), draw.randint(2, 99)
    return f"{a}*{b}={_answer(draw, a * b, _without_carry([(b, a)]))}"


def _largest(draw: random.Random) -> str:
    numbers = draw.sample(range(100), 4)
    careless = max(numbers, key=lambda number: (number % 10, number))
    return f"{' '.join(map(str, numbers))} -> {_answer(draw, max(numbers), careless)}"


def _answer(draw: random.Random, right: int, careless: int) -> int:
    return careless if draw.random() < CARELESS else right


def _without_carry(terms: list[tuple[int, int]]) -> int:
    """The sum of number times factor, each decimal place on its own and modulo ten."""
    places = [sum(number // 10**i % 10 * factor for number, factor in terms) % 10 for i in range(2)]
    return places[0] + 10 * places[1]


def _difference(draw: random.Random) -> str:
    a, b = sorted((draw.randint(0, 99), draw.randint(0, 99)), reverse=True)
    return f"{a}-{b}={a - b}"


def _letters(draw: random.Random) -> str:
    return "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(3, 6)))


def _reversed(draw: random.Random) -> str:
    word = _letters(draw)
    return f"back {word} -> {word[::-1]}"


def _sorted(draw: random.Random) -> str:
    word = _letters(draw)
    return f"sort {word} -> {''.join(sorted(word))}"


def _counting(draw: random.Random) -> str:
    start, step = draw.randint(0, 40), draw.randint(1, 9)
    return "count " + " ".join(str(start + i * step) for i in range(5))


def _sentence(draw: random.Random) -> str:
    who, other = draw.sample(["cat", "dog", "bird", "child", "king", "cook", "ship", "tree"], 2)
    verb = draw.choice(["sees", "likes", "finds", "follows", "hears"])
    how = draw.choice(["old", "red", "small", "quiet", "kind"])
    return f"the {how} {who} {verb} the {other} and the {other} {verb} the {how} {who}."


TASKS: list[Line] = [_sum, _product, _largest]
OTHERS: list[Line] = [_difference, _reversed, _sorted, _counting, _sentence]


def documents(seed: int) -> Iterator[str]:
    """Three to six lines of one kind, without end; half of them of the tasks' kinds."""
    draw = random.Random(seed)
    while True:
        kind = draw.choice(TASKS if draw.random() < 0.5 else OTHERS)
        yield "".join(kind(draw) + "\n" for _ in range(draw.randint(3, 6)))


def other_text(seed: int, documents_: int = 20) -> str:
    """Text of the other kinds alone, from a seed of its own."""
    draw = random.Random(seed)
    return "".join(OTHERS[i % len(OTHERS)](draw) + "\n" for i in range(documents_) for _ in range(4))


# ---- model and tokenizer


def tokenizer() -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([PAD, END, *CHARACTERS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=PAD,
        eos_token=END,
        unk_token="?",
        model_max_length=512,
    )


def batches(seed: int, size: int) -> Iterator[Tensor]:  # -> (size, LENGTH + 1) int64
    """Documents one after the other, each ended by its token, cut into sequences."""
    ids = {character: i + 2 for i, character in enumerate(CHARACTERS)}
    stream: list[int] = []
    for document in documents(seed):
        stream += [*(ids[character] for character in document), 1]
        if len(stream) >= size * (LENGTH + 1):
            yield torch.tensor(stream[: size * (LENGTH + 1)]).view(size, LENGTH + 1)
            stream = []


def pretrain(steps: int, size: int, learning_rate: float, seed: int) -> tuple[Any, list[float]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(CHARACTERS) + 2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        **SHAPE,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, betas=(0.9, 0.95), weight_decay=0.05)
    losses = []
    for step, batch in zip(range(steps), batches(seed + 1, size), strict=False):
        warm = min(1.0, (step + 1) / 50)
        rate = learning_rate * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        logits = model(input_ids=batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step}: loss {sum(losses[-50:]) / len(losses[-50:]):.3f}", flush=True)
    return model.eval(), losses


def weights_hash(model: Any) -> str:
    found = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        found.update(name.encode() + value.contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if (options.folder / "pretraining.json").is_file():
        print(f"{options.folder} holds a pretrained model already; remove it to train another one")
        return
    torch.set_num_threads(options.threads)
    begun = time.perf_counter()
    model, losses = pretrain(options.steps, options.batch, options.learning_rate, options.seed)
    with torch.no_grad():  # as released models are; what a run changes is then what a bf16 checkpoint shows
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    model.save_pretrained(options.folder)
    tokenizer().save_pretrained(options.folder)
    (options.folder / "other_text.txt").write_text(other_text(options.seed + 2), encoding="utf-8")
    summary = {
        "settings": {name: str(value) if name == "folder" else value for name, value in vars(options).items()},
        "shape": SHAPE,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "last_losses": sum(losses[-50:]) / len(losses[-50:]),
        "weights": weights_hash(model),
        "seconds": time.perf_counter() - begun,
        "environment": environment("cpu"),
    }
    (options.folder / "pretraining.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: summary[name] for name in ("parameters", "last_losses", "weights", "seconds")}))


if __name__ == "__main__":
    main()

"""What a trained model can do and how far it went: accuracy, divergence from the base, loss on other text.

Everything here leaves the training as it was: random numbers come from a fork, modes are restored, gradients are off.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .rewards import score
from .tasks import Item, Task

OTHER_TEXT = Path(__file__).parent / "other_text.txt"
TEXT_BLOCK = 256  # tokens


@dataclass(frozen=True)
class Reference:
    """The pretrained model: another copy, or the adapted one with its adapter off."""

    model: nn.Module
    off: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True)
class Sampled:
    """Completions of some prompts, padded on both sides."""

    ids: Tensor  # (n, prompt + completion)
    attention: Tensor  # (n, prompt + completion), 0 on padding and after the end
    width: int  # columns of the completion

    @property
    def kept(self) -> Tensor:  # (n, width) bool: tokens of the completion, the one that ends it included
        return self.attention[:, -self.width :].bool()


@contextmanager
def as_found(model: nn.Module, seed: int) -> Iterator[None]:
    """Evaluation mode, no gradients, random numbers from ``seed``; all as before afterwards."""
    training = {module: module.training for module in model.modules()}
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(seed)
        model.eval()
        try:
            yield
        finally:
            for module, mode in training.items():
                module.training = mode


def accuracy(
    model: nn.Module, tokenizer: Any, task: Task, items: list[Item], *, max_new_tokens: int, batch: int
) -> dict[str, Any]:
    """Greedy answers to ``items``: the share that earns 1, and for each item whether it does."""
    correct: list[int] = []
    for start in range(0, len(items), batch):
        chunk = items[start : start + batch]
        sampled = complete(model, tokenizer, task, chunk, max_new_tokens=max_new_tokens, sample=False)
        values = score(task.verifier, decode(tokenizer, sampled), task.columns(chunk))
        correct += [int(value >= 1) for value in values]
    return {"accuracy": sum(correct) / len(correct), "correct": correct}


def divergence(
    model: nn.Module,
    reference: Reference,
    tokenizer: Any,
    task: Task,
    items: list[Item],
    *,
    max_new_tokens: int,
    temperature: float,
    batch: int,
) -> dict[str, float]:
    """KL(policy ‖ pretrained) and entropy in nats per token, and mean length, on completions that the policy samples.

    Both are sums over the whole vocabulary at every sampled position (the sampled tokens alone would be noisier), of
    the distributions at temperature 1.
    """
    total = {"kl": 0.0, "entropy": 0.0}
    tokens = 0
    for start in range(0, len(items), batch):
        chunk = items[start : start + batch]
        drawn = complete(
            model, tokenizer, task, chunk, max_new_tokens=max_new_tokens, sample=True, temperature=temperature
        )
        policy = completion_log_probs(model, drawn)
        with reference.off():
            base = completion_log_probs(reference.model, drawn)
        kl = (policy.exp() * (policy - base)).sum(-1)  # (n, width)
        entropy = -(policy.exp() * policy).sum(-1)
        total["kl"] += float(kl[drawn.kept].sum(dtype=torch.float64))
        total["entropy"] += float(entropy[drawn.kept].sum(dtype=torch.float64))
        tokens += int(drawn.kept.sum())
    return {**{name: value / tokens for name, value in total.items()}, "completion_length": tokens / len(items)}


def other_text(path: str) -> str:
    """The text in a file, or the package's own where ``path`` is empty; raises ``ValueError`` where there is none."""
    try:
        return (Path(path) if path else OTHER_TEXT).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"other_text={path!r} cannot be read as text: {error}") from None


def check_text(text: str, tokenizer: Any) -> Tensor:  # -> (tokens,) int64
    """The text's tokens; raises ``ValueError`` where they are too few for a loss."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"][0]
    if ids.numel() < 2:
        raise ValueError(f"the text has {ids.numel()} tokens: a loss needs at least 2")
    return ids


def text_loss(model: nn.Module, tokenizer: Any, text: str) -> float:
    """Mean loss in nats per token on a text, in blocks of 256 tokens."""
    ids = check_text(text, tokenizer).to(_device(model))
    total, count = 0.0, 0
    for block in ids.split(TEXT_BLOCK):
        if block.numel() < 2:
            continue
        logits = model(input_ids=block[None]).logits[0, :-1].float()
        total += float(nn.functional.cross_entropy(logits, block[1:], reduction="sum"))
        count += block.numel() - 1
    return total / count


def complete(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    items: list[Item],
    *,
    max_new_tokens: int,
    sample: bool,
    temperature: float = 1.0,
) -> Sampled:
    """One completion of each item's prompt, greedy or sampled from the whole distribution."""
    encoded = encode(tokenizer, [item.prompt for item in items]).to(_device(model))
    ends = end_tokens(model, tokenizer, task.stop)
    options: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if sample else {"do_sample": False}
    )
    options["repetition_penalty"] = 1.0  # as the trainers have it: an instruct model's own would apply otherwise
    ids = model.generate(  # type: ignore[operator]
        **encoded, **options, max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
    )
    width = ids.shape[1] - encoded["input_ids"].shape[1]
    ended = torch.isin(ids[:, -width:], torch.tensor(ends, device=ids.device))
    kept = ended.cumsum(1) - ended.int() == 0  # up to the first end, that one included
    return Sampled(ids, torch.cat([encoded["attention_mask"], kept.long()], 1), width)


def completion_log_probs(model: nn.Module, sampled: Sampled) -> Tensor:  # (n, width, vocabulary), fp32
    """Log-probabilities of every token at the positions of the completions."""
    position = (sampled.attention.cumsum(1) - 1).clamp(min=0)
    inputs: dict[str, Any] = {"input_ids": sampled.ids, "attention_mask": sampled.attention, "position_ids": position}
    keep = sampled.width + 1  # the last prompt token predicts the first of the completion
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    if "logits_to_keep" in inspect.signature(inner.forward).parameters:
        inputs["logits_to_keep"] = keep
    logits = model(**inputs).logits[:, -keep:-1]
    return logits.float().log_softmax(-1)


def decode(tokenizer: Any, sampled: Sampled) -> list[str]:
    """The completions' texts without what follows their end."""
    rows = [row[kept] for row, kept in zip(sampled.ids[:, -sampled.width :], sampled.kept, strict=True)]
    return tokenizer.batch_decode(rows, skip_special_tokens=True)


def encode(tokenizer: Any, prompts: list[Any]) -> Any:
    """Prompts as the trainers encode them, padded on the left: text as it is, messages through the chat template."""
    if isinstance(prompts[0], str):
        return tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    return tokenizer.apply_chat_template(
        prompts,
        add_generation_prompt=True,
        padding=True,
        tokenizer_kwargs={"padding_side": "left"},
        return_tensors="pt",
        return_dict=True,
    )


def end_tokens(model: nn.Module, tokenizer: Any, stop: str | None) -> list[int]:
    """The ids that end a completion: the model's own and the task's stop text.

    Raises:
        ValueError: a stop text that is not one token of this tokenizer.
    """
    own = model.generation_config.eos_token_id  # type: ignore[union-attr]
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    if stop is not None:
        ids = tokenizer.encode(stop, add_special_tokens=False)
        if len(ids) != 1:
            raise ValueError(f"the task's stop {stop!r} is {len(ids)} tokens of this tokenizer: it has to be one")
        ends.add(ids[0])
    return sorted(ends)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device

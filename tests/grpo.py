"""TRL's GRPOTrainer on a tiny model with a whitespace tokenizer, on the CPU, without network."""

from pathlib import Path
from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(125))]
    words_only = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    words_only.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words_only, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def _reward(completions: list[str], **_: Any) -> list[float]:
    """Different within a group, so that advantages and gradients are not zero."""
    return [float(sum(map(ord, completion)) % 7) for completion in completions]


def trainer_for(
    model: Any, folder: Path, peft_config: Any = None, *, steps: int = 2, optimizers: Any = (None, None), **options: Any
) -> GRPOTrainer:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 6,
        "learning_rate": 1e-2,
        "beta": 0.1,
        "seed": 0,
    }
    prompts = Dataset.from_dict({"prompt": [f"w{i} w{i + 1} w{i + 2}" for i in range(16)]})
    return GRPOTrainer(
        model=model,
        reward_funcs=_reward,
        args=GRPOConfig(**{**settings, **options}),
        train_dataset=prompts,
        processing_class=tokenizer(),
        peft_config=peft_config,
        optimizers=optimizers,
    )


def kl_per_step(trainer: GRPOTrainer) -> list[float]:
    trainer.train()
    return [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]

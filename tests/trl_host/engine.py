"""What stands in for vLLM: TRL's own sync code runs and sends to an engine that records, or generates, here."""

from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl.generation import vllm_client, vllm_generation
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration

import grpo

FLAVOURS = ["colocate", "server"]
Sent = list[tuple[str, Tensor]]


class Engine:
    """`vllm.LLM` as far as TRL touches it. Keeps a copy of all that it is sent, one list for each sync."""

    def __init__(self, model: PreTrainedModel | None = None) -> None:
        self.syncs: list[Sent] = []
        self._open: Sent = []
        self.model = model  # of the same architecture, to generate with
        self.generator = torch.Generator().manual_seed(0)
        runner = SimpleNamespace(model=SimpleNamespace(load_weights=self.load_weights))
        worker = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
        self.llm_engine = SimpleNamespace(model_executor=worker, model_config=SimpleNamespace(max_model_len=128))

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in tensors:
            assert not tensor.requires_grad and not tensor.is_meta
            self._open.append((name, tensor.clone()))

    def reset_prefix_cache(self) -> None:
        """The end of a sync."""
        self.syncs.append(self._open)
        self._open = []
        if self.model is not None:
            missing, unexpected = self.model.load_state_dict(dict(self.syncs[-1]), strict=False)
            assert not missing and not unexpected, (missing, unexpected)

    @torch.no_grad()
    def generate(self, prompts: list[dict[str, Any]], sampling_params: dict[str, Any], use_tqdm: bool) -> list[Any]:
        """Samples at temperature 1 with the weights that were sent last."""
        assert self.model is not None
        answers = []
        for prompt in prompts:
            ids, tokens, logprobs = list(prompt["prompt_token_ids"]), [], []
            for _ in range(sampling_params["max_tokens"]):
                scores = self.model(input_ids=torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
                token = int(torch.multinomial(scores.exp(), 1, generator=self.generator))
                tokens.append(token)
                logprobs.append({token: SimpleNamespace(logprob=float(scores[token]), rank=1)})
                ids.append(token)
                if token == self.model.config.eos_token_id:
                    break
            output = SimpleNamespace(token_ids=tokens, logprobs=logprobs)
            answers.append(SimpleNamespace(prompt_token_ids=prompt["prompt_token_ids"], outputs=[output]))
        return answers

    def last(self) -> dict[str, Tensor]:
        found = dict(self.syncs[-1])
        assert len(found) == len(self.syncs[-1]), "a name was sent twice"
        return found


def install(patch: pytest.MonkeyPatch, engine: Engine) -> None:
    """Every `VLLMGeneration` made from now on talks to `engine` instead of starting one."""

    def start(self: VLLMGeneration) -> None:
        self.llm = engine
        self.vllm_client = client(patch, engine)
        self._llm_weights_sleeping = False

    patch.setattr(VLLMGeneration, "_init_vllm", start)
    patch.setattr(vllm_generation, "SamplingParams", dict, raising=False)


Send = Callable[[Iterator[tuple[str, Tensor]]], Iterable[tuple[str, Tensor]]]


def client(patch: pytest.MonkeyPatch, engine: Engine, send: Send = iter) -> VLLMClient:
    """TRL's client, with the requests answered and `send` in the place of vLLM's transfer."""
    made = object.__new__(VLLMClient)
    made.base_url, made.communicator, made._updating_weights = "http://nowhere", None, False
    announced: dict[str, Any] = {}

    def post(url: str, **body: Any) -> dict[str, Any]:
        if url.endswith("/update_weights"):
            announced.update(body["json"]["update_info"])
        return {"success": True}

    def transfer(iterator: Iterator[tuple[str, Tensor]], trainer_args: Any) -> None:
        start = len(engine._open)
        engine.load_weights(send(iterator))
        sent = engine._open[start:]
        assert [name for name, _ in sent] == announced["names"]
        assert [list(tensor.shape) for _, tensor in sent] == announced["shapes"]
        assert [str(tensor.dtype).removeprefix("torch.") for _, tensor in sent] == announced["dtype_names"]

    def reset() -> None:
        engine.reset_prefix_cache()

    made._post, made.reset_prefix_cache = post, reset
    transport = SimpleNamespace(trainer_send_weights=transfer)
    patch.setattr(vllm_client, "_HAS_STATEFUL_TRAINER_ENGINE", False)
    patch.setattr(vllm_client, "NCCLWeightTransferEngine", transport, raising=False)
    patch.setattr(vllm_client, "NCCLTrainerSendWeightsArgs", SimpleNamespace, raising=False)
    return made


def generation(model: nn.Module, mode: str = "colocate") -> VLLMGeneration:
    """TRL's object, as its trainers make it; `install` comes first."""
    return VLLMGeneration(model=model, accelerator=Accelerator(cpu=True), processing_class=grpo.tokenizer(), mode=mode)

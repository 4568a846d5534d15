"""What one would use instead: transformers' own generation, on the same weights and prompts."""

import time
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer


class _Stamps(BaseStreamer):
    """The time at which each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


@torch.inference_mode()
def generate_steps(model: Any, prompts: list[list[int]], tokens: int) -> list[float]:
    """Seconds of each of `tokens` steps of `model.generate`, the prompt's left out.

    Args:
        prompts: of equal lengths.
    """
    stamps = _Stamps()
    ids = torch.tensor(prompts, device=model.device)
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        generation_config=_greedy(tokens + 1),
        streamer=stamps,
    )
    # The first stamp is the prompt's, the second comes with the prefill.
    return _differences(stamps.times[1:])


@torch.inference_mode()
def generate_batch_steps(model: Any, prompts: list[list[int]], tokens: int) -> list[float]:
    """Seconds of each of `tokens` steps of `model.generate_batch`, transformers' continuous
    batching; steps at which a prompt was read are left out."""
    outputs = model.generate_batch(
        prompts,
        generation_config=_greedy(tokens + 1),
        record_timestamps=True,
        progress_bar=False,
        warmup=False,
    )
    times = [output.timestamps for output in outputs.values()]
    last_start = max(stamps[0] for stamps in times)
    longest = max(times, key=len)
    return _differences([t for t in longest if t >= last_start])


@torch.inference_mode()
def assisted_seconds(model: Any, assistant: Any, prompt: list[int], tokens: int) -> float:
    """Seconds of `model.generate(assistant_model=...)` for so many tokens, prompt included."""
    ids = torch.tensor([prompt], device=model.device)
    started = time.perf_counter()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        generation_config=_greedy(tokens),
        assistant_model=assistant,
    )
    return time.perf_counter() - started


@torch.inference_mode()
def forward_seconds(model: Any, ids: list[int]) -> float:
    """Seconds of one forward pass over a prompt, logits of its last token alone."""
    started = time.perf_counter()
    model(torch.tensor([ids], device=model.device), use_cache=True, logits_to_keep=1)
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter() - started


def _greedy(tokens: int) -> GenerationConfig:
    # no end-of-text id: exactly so many tokens
    return GenerationConfig(
        max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0
    )


def _differences(times: list[float]) -> list[float]:
    return [after - before for before, after in zip(times, times[1:], strict=False)]

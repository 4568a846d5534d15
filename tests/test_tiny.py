"""The tiny models other tests lean on: they build, repeat themselves for a seed, and generate."""

import pytest
import torch

from tests.tiny import ARCHITECTURES


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_builds_and_generates(tiny_model, tokenizer, architecture):
    model, again, other = (tiny_model(architecture, seed) for seed in (0, 0, 1))
    prompt = tokenizer("Ann has 3 apples.", return_tensors="pt").input_ids
    with torch.inference_mode():
        logits = model(prompt).logits
        assert torch.equal(logits, again(prompt).logits)
        assert not torch.equal(logits, other(prompt).logits)
    written = model.generate(prompt, do_sample=False, min_new_tokens=12, max_new_tokens=12)
    assert written.shape[1] == prompt.shape[1] + 12
    _check_reads(model, len(tokenizer))
    assert max(tokenizer.get_vocab().values()) < model.config.vocab_size == logits.shape[-1]


def _check_reads(model, vocab_size):
    """What it says hangs on all that it read: with wrong attention it would say something else."""
    random_ids = torch.randint(0, vocab_size, (1, 32), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        said = model(random_ids).logits[0].argmax(-1)
        after_last_token = model(random_ids.T).logits[:, 0].argmax(-1)
    assert len(set(said.tolist())) > 5, "it says different things"
    assert (said != after_last_token)[1:].float().mean() > 0.5

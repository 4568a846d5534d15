"""Pairs with two tokenizers: two timelines of one text, nothing lost or doubled at a seam."""

import copy
import random

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from r2r_glimp.core import FinishEvent, Model, RoutingParams, SamplingParams, UsageError
from r2r_glimp.engine.engine import Engine
from r2r_glimp.models import LoadedModel, ModelPair
from tests.engine.conftest import babbler


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and a few merges; think tags are plain tokens, and the chat template opens no
    thinking."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("h", "a"), ("Ġ", "ha"), ("t", "s"), ("Ġha", "ts"), ("C", "u")]
    vocab = {symbol: i for i, symbol in enumerate([*alphabet, *("".join(m) for m in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.add_tokens(
        [AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)]
    )
    template = "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>", chat_template=template
    )


@pytest.fixture(scope="module")
def pairs(tokenizer: PreTrainedTokenizerFast) -> tuple[ModelPair, ModelPair]:
    """The same pair twice: for the engine, and with plain attention to check it."""
    other = byte_tokenizer()
    other.add_tokens(["<|im_end|>"])
    slm, llm = babbler(tokenizer, 1), babbler(other, 2)

    def make() -> ModelPair:
        return ModelPair(
            slm=LoadedModel.from_model(copy.deepcopy(slm), tokenizer, name="slm"),
            llm=LoadedModel.from_model(copy.deepcopy(llm), other, name="llm"),
        )

    return make(), make()


def test_token_granularity_is_refused(pairs: tuple[ModelPair, ModelPair]) -> None:
    engine = Engine(pairs[0], kv_memory="4MiB")
    assert not engine.shared
    with pytest.raises(UsageError, match="tokenizers of this pair differ"):
        engine.add_request("Sum", routing=RoutingParams(granularity="token"))
    with pytest.raises(UsageError, match="token ids mean different text"):
        engine.add_request([1, 2, 3])


def test_no_text_is_lost_or_doubled_at_a_seam(pairs: tuple[ModelPair, ModelPair]) -> None:
    pair, plain = pairs
    rng = random.Random(0)
    seen = {"slm": 0, "llm": 0}
    for trial in range(25):
        engine = Engine(
            pair, kv_memory=rng.choice(["64KiB", "1MiB"]), max_batch_tokens=rng.choice([7, 512])
        )
        sampling = SamplingParams(max_tokens=rng.choice([20, 60]), ignore_eos=True, seed=trial)
        for i in range(3):
            engine.add_request(
                [{"role": "user", "content": "Sum hats 4" * (i + 1)}],
                sampling,
                RoutingParams(
                    router="random",
                    threshold=0.5,
                    max_step_tokens=rng.choice([5, 512]),
                    max_thinking_tokens=rng.choice([None, 15]),
                    max_llm_share=rng.choice([None, 0.6]),
                ),
            )
        while engine.has_work:
            running = list(engine.running) or list(engine.scheduler.waiting)
            finished = {e.request_id: e.output for e in engine.step() if isinstance(e, FinishEvent)}
            engine.check_integrity()
            for sequence in running:
                _check_timelines(pair, sequence)
                if sequence.request_id in finished:
                    output = finished[sequence.request_id]
                    assert output.text == sequence.text
                    for source in output.sources:
                        seen[source] += 1
                    if trial < 10:
                        _check_tokens(plain, sequence)
        assert [pool.num_free for pool in engine.kv.pools] == [engine.kv.num_blocks] * 2
    assert min(seen.values()) > 100


def _check_timelines(pair: ModelPair, sequence) -> None:  # type: ignore[no-untyped-def]
    """What each model has read is exactly the beginning of the text."""
    for model in Model:
        timeline = sequence.timelines[model]
        ids = timeline.tokens[timeline.num_prompt_tokens :]
        text = pair[model].tokenizer.decode(ids, skip_special_tokens=False)
        readable = text.rstrip("\ufffd")
        assert sequence.text.startswith(readable) or readable.startswith(sequence.text)
        assert len(readable) >= timeline.num_chars


def _check_tokens(plain: ModelPair, sequence) -> None:  # type: ignore[no-untyped-def]
    """Every token a model wrote is its greedy choice after what it had read."""
    cursors = {m: sequence.timelines[m].num_prompt_tokens for m in Model}
    for model in Model:
        ids = sequence.timelines[model].tokens
        with torch.inference_mode():
            choices = plain[model].model(torch.tensor([ids])).logits[0].argmax(-1).tolist()
        own = [t for t, s in zip(sequence.tokens, sequence.sources, strict=True) if s is model]
        greedy = [t for p, t in enumerate(ids) if p >= cursors[model] and t == choices[p - 1]]
        matched = _common(own, greedy)
        forced = sequence.stats.forced_tokens if model is Model.SLM else 0
        assert matched >= len(own) - forced


def _common(a: list[int], b: list[int]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        above = row
        row = [0]
        for j, y in enumerate(b):
            row.append(above[j] + 1 if x == y else max(row[j], above[j + 1]))
    return row[-1]


def test_thinking_that_one_template_opens_is_opened_for_both(
    pairs: tuple[ModelPair, ModelPair],
) -> None:
    engine = Engine(pairs[0], kv_memory="1MiB")
    engine.add_request([{"role": "user", "content": "Sum"}])
    [sequence] = engine.scheduler.waiting
    texts = [
        pairs[0][m].tokenizer.decode(sequence.timelines[m].tokens, skip_special_tokens=False)
        for m in Model
    ]
    assert [text.count("<think>") for text in texts] == [1, 1]
    assert sequence.policy.section == "thinking"


def test_baselines_equal_plain_generation(pairs: tuple[ModelPair, ModelPair]) -> None:
    pair, plain = pairs
    engine = Engine(pair, kv_memory="1MiB")
    for model, router in zip(Model, ("slm", "llm"), strict=True):
        ids = plain[model].tokenizer("Sum hats")["input_ids"]
        expected = plain[model].model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            do_sample=False, max_new_tokens=20, eos_token_id=-1,
        )[0, len(ids) :].tolist()  # fmt: skip
        sampling = SamplingParams(max_tokens=20, ignore_eos=True)
        output = engine.generate("Sum hats", sampling, RoutingParams(router=router))[0]
        assert output.token_ids == expected

"""Reading texts beside what the engine writes."""

from collections.abc import Callable

import pytest
import torch

from r2r_glimp import Engine, Model, SamplingParams
from r2r_glimp.engine.prefill import forget_prefixes, read_rows
from r2r_glimp.models import ModelPair


def wanted_rows(pair: ModelPair, model: Model, tokens: list[int]) -> tuple[torch.Tensor, ...]:
    with torch.inference_mode():
        out = pair[model].model(torch.tensor([tokens]), output_hidden_states=True)
    return out.hidden_states[-1][0], out.logits[0]


@pytest.mark.parametrize("max_batch_tokens", [7, 64, 2048])
@pytest.mark.parametrize("model", Model)
def test_rows_are_those_of_a_plain_forward(
    make_pair: Callable[[], ModelPair],
    plain_pair: ModelPair,
    words: list[int],
    model: Model,
    max_batch_tokens: int,
) -> None:
    engine = Engine(make_pair(), kv_memory="2MiB", max_batch_tokens=max_batch_tokens)
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(words), (4, 50), generator=generator).tolist()
    texts = [[words[i] for i in row] for row in picks]
    texts[2] = texts[0][:40]  # shares a prefix with another of the same call
    firsts = [0, 49, 5, 20]
    for _ in range(2):  # the second time out of the cache
        got: dict[int, list] = {}
        for index, rows in read_rows(engine, model, list(zip(texts, firsts, strict=True))):
            got.setdefault(index, []).append(rows)
        for index, (tokens, first) in enumerate(zip(texts, firsts, strict=True)):
            hidden, logits = wanted_rows(plain_pair, model, tokens)
            torch.testing.assert_close(
                torch.cat([r.hidden_RH for r in got[index]]), hidden[first:], atol=1e-4, rtol=1e-4
            )
            torch.testing.assert_close(
                torch.cat([r.logits_RV for r in got[index]]), logits[first:], atol=1e-4, rtol=1e-4
            )
        engine.check_integrity()


def test_texts_that_find_no_blocks_are_left_for_later(
    make_pair: Callable[[], ModelPair], words: list[int]
) -> None:
    engine = Engine(make_pair(), kv_memory="2MiB")
    capacity = engine.kv.capacity
    length = min(480, capacity)
    texts = [([words[i % 3]] * length, 0) for i in range(3)]
    held = engine.kv.pools[0].allocate(engine.kv.num_blocks - (length // 16))
    assert held is not None
    seen = [index for index, _ in read_rows(engine, Model.SLM, texts)]
    assert set(seen) == {0, 1, 2}  # one after the other, in the same blocks
    extra = engine.kv.pools[0].allocate(1)
    assert extra is not None
    assert list(read_rows(engine, Model.SLM, texts)) == []
    engine.kv.pools[0].free([*held, *extra])
    engine.check_integrity()


def test_a_closed_reading_leaves_no_block_behind(
    make_pair: Callable[[], ModelPair], words: list[int]
) -> None:
    engine = Engine(make_pair(), kv_memory="2MiB", max_batch_tokens=16)
    reading = read_rows(engine, Model.SLM, [([words[0]] * 100, 0)])
    next(reading)
    reading.close()
    engine.check_integrity()


def test_forgotten_prefixes_are_computed_again(
    make_pair: Callable[[], ModelPair], words: list[int]
) -> None:
    engine = Engine(make_pair(), router="llm", kv_memory="2MiB")
    prompt = [words[i % 5] for i in range(60)]

    def hits() -> int:
        [output] = engine.generate([prompt], SamplingParams(max_tokens=2))
        return output.stats.llm_computed

    assert hits() >= 60 and hits() < 20
    forget_prefixes(engine)
    assert hits() >= 60

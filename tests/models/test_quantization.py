"""A quantised LLM: what transformers computes with such weights, and what cannot be is refused."""

from importlib.util import find_spec

import pytest
import torch
from transformers import AutoModelForCausalLM

from r2r_glimp.core import SamplingParams, UsageError
from r2r_glimp.engine.engine import Engine
from r2r_glimp.models import ModelPair
from r2r_glimp.models.fingerprint import Fingerprint
from r2r_glimp.native.layer import is_plain

installed = find_spec("torchao") is not None
needs_torchao = pytest.mark.skipif(not installed, reason="torchao is not installed")
PROMPT = [5, 6, 7, 8]


def load(folder, **options):
    return ModelPair.from_pretrained(folder, folder, device="cpu", **options)


@needs_torchao
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_llm_alone_is_quantised_and_writes_what_generate_does(checkpoint, dtype):
    from r2r_glimp.models.quantization import quantization_config

    folder = checkpoint()
    pair = load(folder, dtype=dtype, llm_quantization="int8")
    assert pair.slm is not pair.llm
    assert is_plain(pair.slm.model.model.layers[0].mlp.up_proj)
    assert not is_plain(pair.llm.model.model.layers[0].mlp.up_proj)
    peer = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), quantization_config=quantization_config("int8")
    ).eval()
    wanted = peer.generate(
        torch.tensor([PROMPT]), max_new_tokens=12, min_new_tokens=12, do_sample=False
    )[0, len(PROMPT) :].tolist()
    engine = Engine(pair, router="llm", kv_memory=2**22)
    assert "int8 weights by torchao" in engine.runners[1].paths
    assert "torchao" not in engine.runners[0].paths
    sampling = SamplingParams(max_tokens=12, ignore_eos=True)
    assert engine.generate([PROMPT], sampling)[0].token_ids == wanted


@needs_torchao
def test_outputs_name_it_and_a_fingerprint_keeps_it(checkpoint):
    folder = checkpoint()
    pair = load(folder, llm_quantization="int8")
    stored = pair.llm.fingerprint.to_dict()
    assert stored["quantization"] == "int8"
    assert "quantization" not in pair.slm.fingerprint.to_dict()
    assert Fingerprint.from_dict(stored) == pair.llm.fingerprint
    assert pair.llm.fingerprint.mismatch(pair.slm.fingerprint) is None  # as with another dtype


@needs_torchao
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"llm_quantization": "int4"}, "needs a GPU"),
        ({"llm_quantization": "int3"}, "int8, int4"),
        ({"llm_quantization": "int8", "llm_adapters": ["a/b"]}, "merge adapters"),
    ],
)
def test_what_cannot_be_is_refused(checkpoint, options, said):
    with pytest.raises(UsageError, match=said):
        load(checkpoint(), **options)


@pytest.mark.skipif(installed, reason="torchao is installed")
def test_without_torchao_it_says_what_to_install(checkpoint):
    with pytest.raises(UsageError, match="pip install"):
        load(checkpoint(), llm_quantization="int8")

"""Free labels: rows of routed outputs that were recorded anyway, at no extra LLM cost."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from labeling.batch import Batch, Written
from labeling.config import LabelingConfig
from labeling.formats import Question
from labeling.label import label_response, to_table
from labeling.respond import make_response
from labeling.schema import labeled_features
from labeling.sections import ResponseConfig, VerifierConfig
from labeling.setting import Setting
from r2r_glimp.core import RequestOutput, UsageError
from r2r_glimp.engine.engine import Engine

if TYPE_CHECKING:
    from datasets import Dataset


def label_outputs(
    engine: Engine,
    outputs: Sequence[RequestOutput],
    *,
    source: str = "routed",
    top_k_logits: int = 32,
) -> "Dataset":
    """Rows labeled identical or divergent, for each position at which a trace knows the LLM's
    choice. The SLM reads each text once for its features; the LLM computes nothing.

    Args:
        engine: idle, with the pair that wrote the outputs.
        outputs: of requests with `RoutingParams(trace=True)`.
        source: for the column of that name.
        top_k_logits: how many of the SLM's highest logits a row keeps.

    Raises:
        UsageError: an output has no trace.
    """
    config = LabelingConfig(
        granularity="token",
        responses=ResponseConfig(by="pair", router="llm"),
        verifier=VerifierConfig(kind="identical"),
        top_k_logits=top_k_logits,
    )
    setting = Setting.resolve(config, engine)
    tasks = []
    for output in outputs:
        id = f"{output.request_id}/{output.index}"
        if output.trace is None:
            raise UsageError(f"output {id} has no trace: ask for it with RoutingParams(trace=True)")
        question = Question(id=output.request_id, prompt="", source=source, where=f"output {id}")
        written = Written(output.token_ids, finished=True, trace=output.trace)
        prompt = output.prompt_token_ids
        tasks.append(label_response(make_response(id, question, prompt, written, setting), setting))
    results = dict(Batch(engine).run(tasks))
    table = to_table([results[i] for i in sorted(results)], setting)
    from datasets import Dataset, DatasetInfo
    from datasets.table import InMemoryTable

    features = labeled_features(engine.pair.slm.fingerprint.hidden_size, top_k_logits)
    return Dataset(InMemoryTable(table), info=DatasetInfo(features=features))

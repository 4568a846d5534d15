"""The pair as a model of lm-evaluation-harness (`pip install "r2r_glimp[eval]"`).

    python -m r2r_glimp.lm_eval run --model r2r_glimp --model_args pair=abacus,granularity=step ...

`model_args` are the options of `r2r-glimp generate`, `config=FILE.yaml` among them. A routed text
has no likelihood, so only tasks that generate can be run.
"""

import json
import sys
from collections import Counter
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm

from r2r_glimp.cli.options import add_shared_options, load_engine, read_params
from r2r_glimp.cli.parser import Parser, pick
from r2r_glimp.core import (
    EngineError,
    Prompt,
    RequestOutput,
    RoutingParams,
    SamplingParams,
    UsageError,
)
from r2r_glimp.models.pair import AnyModel

_OURS = ("temperature", "top_p", "top_k", "min_p", "seed")


@register_model("r2r_glimp")
class R2RGlimpLM(LM):
    """A pair, its router and how it samples.

    What follows the thinking is what a task sees; a task's stop strings hold there alone.

    Args:
        options: by name, as `r2r-glimp generate` has them. lm-eval's own --batch_size and --device
            are not looked at: the engine runs `max_batch` requests at once, where `device` says.

    Raises:
        UsageError, CheckpointError: an option or a model is not valid.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        parser = Parser("lm_eval", "", __doc__ or "", ())
        parser.add_config()
        add_shared_options(parser)
        argv = [
            f"--{name}" if value is True else f"--{name}={value}"
            for name, value in options.items()
            if value is not False
        ]
        parsed = parser.parse(argv)
        self._sampling, _ = read_params(parsed)
        self._routing = pick(RoutingParams, parsed)
        self.engine = load_engine(parsed)
        self._is_chat = False
        self._counts: Counter[str] = Counter()

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> "R2RGlimpLM":
        """From `model_args` as they are typed."""
        return super().create_from_arg_string(arg_string)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "R2RGlimpLM":
        """From `model_args` as a dictionary."""
        return super().create_from_arg_obj(arg_dict)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """A routed text for each request, all at once; see `LM.generate_until`."""
        prompts: list[Prompt] = [self._prompt(request.args[0]) for request in requests]
        wanted = [self._wanted(request.args[1]) for request in requests]
        routing = [self._routing] * len(requests)
        with tqdm(total=len(requests), desc="r2r_glimp", disable=disable_tqdm) as bar:
            outputs = self.engine.generate(
                prompts, [sampling for sampling, _ in wanted], routing, lambda _: bar.update()
            )
        texts = []
        for request, output, (_, until) in zip(requests, outputs, wanted, strict=True):
            texts.append(self._answer(output, until))
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts

    def loglikelihood(self, requests: list[Instance], **_: Any) -> list[tuple[float, bool]]:
        """Refused: two models wrote the text."""
        raise UsageError(
            "loglikelihood: two models write a routed text, so no distribution is its own: choose "
            "tasks of output_type generate_until, or evaluate one model with lm-eval's hf"
        )

    def loglikelihood_rolling(self, requests: list[Instance], **_: Any) -> list[float]:
        """Refused, for the same reason."""
        raise UsageError(
            "loglikelihood_rolling: two models write a routed text, so no distribution is its own: "
            "choose tasks of output_type generate_until"
        )

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The messages, to be put through each model's own template when they are read."""
        if not add_generation_prompt:
            raise UsageError("a task that begins the answer itself cannot use the chat template")
        self._is_chat = True
        return json.dumps(chat_history)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The SLM's."""
        return str(self.engine.pair.slm.tokenizer.chat_template or "")

    @property
    def tokenizer_name(self) -> str:
        """Both models, for lm-eval's cache."""
        return "+".join(m.fingerprint.tokenizer_sha256[:16] for m in self._models)

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes beside the results: both models, and who wrote how much."""
        tokens = self._counts["slm"] + self._counts["llm"]
        slm, llm = self._models
        return {
            "slm": slm.name,
            "llm": llm.name,
            "router": self.engine.router.name,
            "generated_tokens": tokens,
            "llm_share": self._counts["llm"] / max(1, tokens),
            "truncated": self._counts["length"],
        }

    @property
    def _models(self) -> tuple[AnyModel, AnyModel]:
        return self.engine.pair.slm, self.engine.pair.llm

    def _prompt(self, context: str) -> Prompt:
        if not self._is_chat:
            return context
        messages: list[dict[str, str]] = json.loads(context)
        return messages

    def _wanted(self, given: dict[str, Any]) -> tuple[SamplingParams, list[str]]:
        """A task's generation arguments: as ours, and the strings that end an answer."""
        limit = self._sampling.max_tokens or 0
        kwargs = dict(normalize_gen_kwargs(given, default_max_gen_toks=limit))
        until = [text for text in kwargs.pop("until") if text]
        values: dict[str, Any] = {"max_tokens": kwargs.pop("max_gen_toks") or None}
        if "do_sample" in given or "temperature" in given:
            values["temperature"] = float(kwargs.get("temperature") or 0.0)
        kwargs = {k: v for k, v in kwargs.items() if k not in ("do_sample", "temperature")}
        if unknown := [name for name in kwargs if name not in _OURS]:
            raise UsageError(f"generation argument {unknown[0]!r} is not known here: leave it out")
        stop = () if self.engine.tags else tuple(until)
        params = {f: getattr(self._sampling, f) for f in _OURS}
        return SamplingParams(**params | kwargs | values, stop=stop), until

    def _answer(self, output: RequestOutput, until: list[str]) -> str:
        if output.error is not None:
            raise EngineError(output.error)
        self._counts["slm"] += output.stats.slm_tokens
        self._counts["llm"] += output.stats.llm_tokens
        self._counts[output.finish_reason] += 1
        close = self.engine.tags.close if self.engine.tags else None
        return postprocess_generated_text(output.text, until, close)


def main() -> int:
    """lm-eval's command line, which knows the pair."""
    from lm_eval.__main__ import cli_evaluate

    from r2r_glimp.cli.errors import run_guarded

    return run_guarded(lambda: cli_evaluate() or 0)


if __name__ == "__main__":
    sys.exit(main())

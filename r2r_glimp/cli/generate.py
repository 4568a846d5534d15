"""`r2r-glimp generate`: write with the pair; a prompt, a text file, or JSONL in and out.

Everything that can be wrong with the input is found before anything is generated.
"""

import dataclasses
import time
from typing import TYPE_CHECKING, cast

from jsonargparse import SUPPRESS, Namespace

from r2r_glimp.cli.errors import Interrupts, say
from r2r_glimp.cli.options import (
    add_shared_options,
    default_router,
    load_engine,
    make_router,
    read_params,
)
from r2r_glimp.cli.outputs import LineWriter, TokenTexts
from r2r_glimp.cli.parser import Parser
from r2r_glimp.cli.render import figures
from r2r_glimp.cli.requests import Batch, Request, read_batch
from r2r_glimp.cli.sinks import JsonSink, Sink, TextSink
from r2r_glimp.core import (
    FinishEvent,
    Prompt,
    R2RGlimpError,
    SamplingParams,
    Stats,
    UsageError,
)

if TYPE_CHECKING:
    from r2r_glimp.engine.engine import Engine
    from r2r_glimp.models.pair import ModelPair
    from r2r_glimp.routing.policy import Route
    from r2r_glimp.routing.routers import Router

EXAMPLES = (
    """$'Say hats 4.\\nSum cups: hats and 3.\\nHow many cups?'""",
    "--granularity step --router entropy --threshold 0.5 --file prompt.txt",
    "--router random --threshold 0.2 --temperature 0.6 --seed 1 --n 4 --json 'Hello'",
    "--file prompts.jsonl --output answers.jsonl --trace --skip_invalid",
    "--pair deepseek-r1-distill-qwen-1.5b-32b --device cuda:0,cuda:1 < prompt.txt",
    "--router slm --print_config > small.yaml",
)


def build_parser() -> Parser:
    """The options of this verb."""
    parser = Parser("generate", "[PROMPT | --file F | < F] [options]", __doc__ or "", EXAMPLES)
    parser.add_config()
    text = "the text; - or nothing reads stdin"
    parser.add_argument(
        "prompt", nargs="?", type=str, default=SUPPRESS, metavar="PROMPT", help=text
    )
    group = parser.add_argument_group("input")
    text = "file with one prompt; or .jsonl: prompt, messages or token_ids, id, options of its own"
    group.add_argument("--file", type=str | None, metavar="F", help=text)
    text = "how to read a file or stdin; auto goes by the suffix, or by the first line of stdin"
    formats = ("auto", "text", "jsonl")
    group.add_argument("--input_format", choices=formats, default="auto", help=text)
    group.add_argument(
        "--system", type=str | None, metavar="TEXT", help="system message before prompts"
    )
    parser.add_flag(group, "raw", "send prompts as they are, without the chat template")
    parser.add_flag(group, "skip_invalid", "run the good lines of a JSONL file that has bad ones")
    group = parser.add_argument_group("output")
    parser.add_flag(group, "json", "one JSON object a line on stdout")
    group.add_argument(
        "--output", type=str | None, metavar="F", help="write the JSON lines to a file instead"
    )
    parser.add_flag(group, "overwrite", "replace that file if it is there")
    parser.add_flag(group, "no_color", "mark the LLM's text by brackets instead of colour")
    parser.add_flag(group, "quiet", "no legend, no figures, no progress bar")
    add_shared_options(parser)
    return parser


def run(argv: list[str]) -> int:
    """The verb; returns 1 if a request failed."""
    options = build_parser().parse(argv)
    sampling, routing = read_params(options)
    _check(options, sampling)
    batch = read_batch(options.get("prompt"), options.file, options.input_format, sampling, routing)
    if options.skip_invalid and not batch.is_jsonl:
        raise UsageError("--skip_invalid is for JSONL input")
    batch.check(skip_invalid=options.skip_invalid)
    as_json = options.json or options.output is not None
    writer = LineWriter(options.output, overwrite=options.overwrite) if as_json else None
    engine = load_engine(options)
    route = _submit(engine, batch, options)
    batch.check(skip_invalid=options.skip_invalid)
    for line in batch.skipped():
        say("warning", line)
    num_outputs = sum(request.sampling.n for request in batch.requests)
    sink: Sink
    if writer is not None:
        sink = JsonSink(writer, num_outputs, quiet=options.quiet)
    else:
        streamed = route if num_outputs == 1 else None
        sink = TextSink(streamed, engine.pair, no_color=options.no_color, quiet=options.quiet)
    return _drive(engine, batch, sink, num_outputs)


def _check(options: Namespace, sampling: SamplingParams) -> None:
    as_json = options.json or options.output is not None
    if options.raw and options.system is not None:
        raise UsageError(
            "--system needs the chat template, which --raw leaves out: drop one of them"
        )
    if options.overwrite and options.output is None:
        raise UsageError("--overwrite goes with --output")
    if sampling.logprobs is not None and not as_json:
        raise UsageError("--logprobs are only told with --json or --output")


def _submit(engine: "Engine", batch: Batch, options: Namespace) -> "Route | None":
    """Queue every request; what the engine refuses joins the problems. The last one's route."""
    from r2r_glimp.routing.policy import Route

    route = None
    routers = Routers(engine, options)
    has_template = has_chat_template(engine.pair)
    if options.system is not None and not has_template:
        raise UsageError("--system needs a chat template, and this pair has none")
    accepted = []
    for request in batch.requests:
        try:
            router = routers.find(request)
            routing = dataclasses.replace(request.routing, router=router)
            prompt = request.prompt
            if request.is_text and has_template and not options.raw:
                prompt = as_messages(request, options.system)
            engine.add_request(prompt, request.sampling, routing, request_id=request.name)
            accepted.append(request)
            route = Route.resolve(
                routing, router, shared=engine.pair.same_vocabulary, apart=engine.pair.apart
            )
        except R2RGlimpError as error:
            if request.line is None:
                raise
            batch.problems.append((request.line, str(error)))
    batch.requests = accepted
    return route


def has_chat_template(pair: "ModelPair") -> bool:
    """Whether messages can be put to the pair: each tokenizer in use has a template."""
    used = [pair.slm] if pair.same_vocabulary else [pair.slm, pair.llm]
    return all(loaded.tokenizer.chat_template is not None for loaded in used)


def as_messages(request: Request, system: str | None) -> Prompt:
    """A text as a user's message, perhaps after a system message."""
    text = str(request.prompt)
    if request.line is None:
        text = text.rstrip("\n")  # the shell's and the editor's, not the user's
    messages = [{"role": "user", "content": text}]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


class Routers:
    """The routers that requests ask for, each made once; without a name, the default one."""

    def __init__(self, engine: "Engine", options: Namespace) -> None:
        self._options = options
        key = (options.router, None if options.router else options.granularity)
        self._routers: dict[tuple[str | None, str | None], Router] = {key: engine.router}

    def find(self, request: Request) -> "Router":
        """Raises UsageError or CheckpointError if there is no such router."""
        name = cast(str | None, request.routing.router)
        granularity = None if name else request.routing.granularity
        key = (name, granularity)
        if key not in self._routers:
            name = name or default_router(self._options, granularity)
            self._routers[key] = make_router(name, self._options.entropy_top_k)
        return self._routers[key]


def _drive(engine: "Engine", batch: Batch, sink: Sink, num_outputs: int) -> int:
    """Run the engine until all is written or a signal comes; returns the exit code."""
    requests = {request.name: request for request in batch.requests}
    texts, stats, reasons = TokenTexts(), list[Stats](), list[str]()
    started = time.monotonic()
    with Interrupts() as interrupts:
        sink.open()
        try:
            while engine.has_work and interrupts.signum is None:
                for event in engine.step():
                    token_texts = texts.add(event)
                    if isinstance(event, FinishEvent):
                        sink.finish(requests[event.request_id], event.output, token_texts or [])
                        stats.append(event.output.stats)
                        reasons.append(event.output.finish_reason)
                    else:
                        sink.token(event)
        finally:
            sink.close()
        if stats:
            sink.say(figures(stats, time.monotonic() - started, reasons))
        if num_outputs > 1 and len(stats) < num_outputs:
            say("stopped", f"{len(stats)} of {num_outputs} outputs are finished")
        interrupts.check()
    failed = reasons.count("error")
    if failed and num_outputs > 1:
        say("error", f"{failed} of {num_outputs} outputs failed")
    return 1 if failed else 0

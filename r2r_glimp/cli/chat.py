"""`r2r-glimp chat`: talk with the pair, turn by turn.

The whole conversation is sent each time; what was computed for earlier turns is found in the prefix
cache. Earlier thinking is not sent again, as the models were trained.
"""

import dataclasses
import signal
import sys
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from jsonargparse import Namespace

from r2r_glimp.cli.errors import Interrupts, say
from r2r_glimp.cli.generate import has_chat_template
from r2r_glimp.cli.options import (
    add_shared_options,
    check_granularity,
    check_routing,
    default_router,
    load_engine,
    make_router,
    read_params,
)
from r2r_glimp.cli.parser import Parser
from r2r_glimp.cli.render import Marks, SpanWriter, figures, set_encoding, use_color
from r2r_glimp.cli.sinks import describe_route
from r2r_glimp.core import (
    DataError,
    Event,
    FinishEvent,
    R2RGlimpError,
    RequestOutput,
    RoutingParams,
    SamplingParams,
    Stats,
    UsageError,
)

if TYPE_CHECKING:
    from r2r_glimp.engine.engine import Engine
    from r2r_glimp.routing.routers import Router

EXAMPLES = (
    "",
    "--granularity step --router entropy --threshold 0.5",
    "--pair qwen3-0.6b-8b --temperature 0.6 --top_p 0.95 --max_tokens 4096",
    "--system 'Answer briefly.' < questions.txt",
)
HELP = """\
/threshold X       defer above this score from now on; without X, above the router's own
/granularity X     token or step
/stats             what the conversation cost so far
/reset             forget the conversation
/quit              leave, as does Ctrl-D
A line that ends in \\ goes on in the next one. Ctrl-C stops an answer; at the prompt it leaves."""


def build_parser() -> Parser:
    """The options of this verb."""
    parser = Parser("chat", "[options]", __doc__ or "", EXAMPLES)
    parser.add_config()
    group = parser.add_argument_group("conversation")
    group.add_argument("--system", type=str | None, metavar="TEXT", help="system message")
    parser.add_flag(group, "no_color", "mark the LLM's text by brackets instead of colour")
    add_shared_options(parser)
    return parser


def run(argv: list[str]) -> int:
    """The verb; returns 1 if a turn failed that did not come from a terminal."""
    options = build_parser().parse(argv)
    sampling, routing = read_params(options)
    for name, value in (
        ("n", sampling.n > 1),
        ("logprobs", sampling.logprobs is not None),
        ("trace", routing.trace),
    ):
        if value:
            raise UsageError(f"--{name} is for generate, not for chat")
    engine = load_engine(options)
    if not has_chat_template(engine.pair):
        raise UsageError(
            "this pair has no chat template, which chat needs: use `r2r-glimp generate --raw`"
        )
    return Chat(engine, options, sampling, routing).loop()


@dataclass(slots=True)
class Totals:
    """What the turns so far cost."""

    stats: list[Stats] = field(default_factory=list)
    elapsed_s: float = 0.0


class Chat:
    """One conversation and the settings it goes on with."""

    def __init__(
        self, engine: "Engine", options: Namespace, sampling: SamplingParams, routing: RoutingParams
    ) -> None:
        set_encoding(sys.stdout, errors="replace")
        self.engine = engine
        self.options = options
        self.sampling = sampling
        self.routing = routing
        self.router: Router = engine.router
        self.messages: list[dict[str, str]] = []
        self.totals = Totals()
        self.marks = Marks(sys.stdout, color=use_color(sys.stdout, no_color=options.no_color))
        self.interactive = sys.stdin.isatty()
        self.failures = 0
        self._line_number = 0
        if self.interactive:
            import readline  # noqa: F401 - gives input() its line editing
        self._reset()

    def loop(self) -> int:
        """Read and answer until the input ends."""
        print(f"{self.marks.legend} | {self._describe()} | /help lists the commands", flush=True)
        while True:
            try:
                line = self._read()
                if line is None or (line.startswith("/") and not self._command(line)):
                    return int(self.failures > 0 and not self.interactive)
                if line.strip() and not line.startswith("/"):
                    self._turn(line)
            except R2RGlimpError as error:
                self.failures += 1
                say("error", str(error))

    # ------------------------------------------------------------------ turns

    def _turn(self, text: str) -> None:
        """Put a message to the pair and show the answer; a turn that fails is not remembered."""
        messages = [*self.messages, {"role": "user", "content": text}]
        started = time.monotonic()
        written, output = self._stream(messages)
        if output is None:
            say("info", "stopped")
        else:
            self.totals.stats.append(output.stats)
            self.totals.elapsed_s += time.monotonic() - started
            if output.finish_reason == "error":
                self.failures += 1  # the engine has said why
                return
            if output.finish_reason != "stop":
                say("info", f"the answer ended by {output.finish_reason}")
        answer = without_thinking(written, opened=self._opens_thinking(messages))
        if answer:
            self.messages = [*messages, {"role": "assistant", "content": answer}]
        else:
            say("info", "there was no answer yet: this turn is forgotten")

    def _stream(self, messages: list[dict[str, str]]) -> tuple[str, RequestOutput | None]:
        """Show an answer as it is written: its text, and its output unless it was stopped."""
        routing = dataclasses.replace(self.routing, router=self.router)
        stream = self.engine.stream(messages, self.sampling, routing)
        events = cast(Generator[Event], stream)  # closing it aborts the request
        writer = SpanWriter(sys.stdout, self.marks)
        written: list[str] = []
        output: RequestOutput | None = None
        with Interrupts() as interrupts:
            try:
                for event in events:
                    if isinstance(event, FinishEvent):
                        output = event.output
                    else:
                        written.append(event.text)
                        writer.write(event.source, event.text)
                    if interrupts.signum is not None:
                        break
            finally:
                events.close()
                writer.close()
                if written:
                    print(flush=True)
            if not self.interactive or interrupts.signum != signal.SIGINT:
                interrupts.check()
        return "".join(written), output

    def _opens_thinking(self, messages: list[dict[str, str]]) -> bool:
        """Whether the chat template opens the thinking itself."""
        tokenizer = self.engine.pair.slm.tokenizer
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return str(prompt).rstrip().endswith("<think>")

    def _read(self) -> str | None:
        """The next message, None at the end of the input."""
        lines: list[str] = []
        while (line := self._read_line("... " if lines else "> ")) is not None:
            if not line.endswith("\\"):
                return "\n".join([*lines, line])
            lines.append(line[:-1])
        return "\n".join(lines) if lines else None

    def _read_line(self, prompt: str) -> str | None:
        if self.interactive:
            try:
                return input(prompt)
            except EOFError:
                print()
                return None
        raw = sys.stdin.buffer.readline()
        self._line_number += 1
        try:
            return raw.decode().rstrip("\r\n") if raw else None
        except UnicodeDecodeError:
            raise DataError(f"stdin, line {self._line_number}: not valid UTF-8") from None

    # ------------------------------------------------------------------ commands

    def _command(self, line: str) -> bool:
        """Do what a line that begins with `/` says; False to leave."""
        name, _, argument = line[1:].strip().partition(" ")
        argument = argument.strip()
        if name in ("quit", "exit"):
            return False
        if name == "help":
            print(HELP)
        elif name == "reset":
            self._reset()
            print("the conversation is forgotten")
        elif name == "stats":
            print(self._stats())
        elif name == "threshold":
            self._set_routing(threshold=_number(argument) if argument else None)
        elif name == "granularity":
            self._set_routing(granularity=argument)
        else:
            raise UsageError(f"unknown command /{name}: /help lists them")
        sys.stdout.flush()
        return True

    def _set_routing(self, **changes: object) -> None:
        """Take a change over if it fits the router; without --router, the granularity's default."""
        routing = dataclasses.replace(self.routing, **changes)  # type: ignore[arg-type]
        check_routing(routing)
        router = self.router
        if "granularity" in changes and self.options.router is None:
            router = make_router(default_router(self.options, routing.granularity))
        check_granularity(router, routing.granularity)
        self.routing, self.router = routing, router
        print(self._describe())

    def _reset(self) -> None:
        system = self.options.system
        self.messages = [] if system is None else [{"role": "system", "content": system}]

    def _describe(self) -> str:
        from r2r_glimp.routing.policy import Route

        return describe_route(
            Route.resolve(
                self.routing,
                self.router,
                shared=self.engine.pair.same_vocabulary,
                apart=self.engine.pair.apart,
            )
        )

    def _stats(self) -> str:
        if not self.totals.stats:
            return "no answer is finished yet"
        turns = len(self.totals.stats)
        return (
            f"{turns} turn{'s' * (turns > 1)} | {figures(self.totals.stats, self.totals.elapsed_s)}"
        )


def without_thinking(text: str, *, opened: bool) -> str:
    """The answer alone: what follows the last `</think>`; nothing where the thinking is still open.

    Args:
        opened: the prompt ended within the thinking.
    """
    _, closing_tag, answer = text.rpartition("</think>")
    if not closing_tag and (opened or "<think>" in text):
        return ""
    return answer.strip()


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"/threshold takes a number: {text!r} is none") from None

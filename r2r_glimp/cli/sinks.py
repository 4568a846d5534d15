"""Where the text goes: to people, as it is written; to programs, line by line."""

import dataclasses
import sys
from typing import TYPE_CHECKING, Any, Protocol

from r2r_glimp.cli.outputs import LineWriter, output_to_dict, to_json_line
from r2r_glimp.cli.progress import make_bar
from r2r_glimp.cli.render import (
    Marks,
    SpanWriter,
    decisions_table,
    set_encoding,
    use_color,
    visible,
)
from r2r_glimp.cli.requests import Request
from r2r_glimp.core import RequestOutput, TokenEvent

if TYPE_CHECKING:
    from r2r_glimp.models.pair import ModelPair
    from r2r_glimp.routing.policy import Route


class Sink(Protocol):
    """Where outputs go."""

    def open(self) -> None: ...
    def token(self, event: TokenEvent) -> None: ...
    def finish(self, request: Request, output: RequestOutput, token_texts: list[str]) -> None: ...
    def close(self) -> None: ...
    def say(self, text: str) -> None:
        """What people should know at the end."""


class TextSink:
    """For people, on stdout: one completion as it is written, several as each finishes."""

    def __init__(
        self, route: "Route | None", pair: "ModelPair", *, no_color: bool, quiet: bool
    ) -> None:
        set_encoding(sys.stdout, errors="replace")
        self._out, self._route, self._pair, self._quiet = sys.stdout, route, pair, quiet
        self._marks = Marks(sys.stdout, color=use_color(sys.stdout, no_color=no_color))
        self._streamed = SpanWriter(sys.stdout, self._marks)
        self._began = False

    def open(self) -> None:
        if not self._quiet:
            route = f" | {describe_route(self._route)}" if self._route else ""
            self.print(f"{self._marks.legend}{route}\n")

    def token(self, event: TokenEvent) -> None:
        if self._route is not None:
            self._began = True
            self._streamed.write(event.source, event.text)

    def finish(self, request: Request, output: RequestOutput, token_texts: list[str]) -> None:
        if self._route is None:
            n = request.sampling.n
            number = f" ({output.index + 1} of {n})" if n > 1 else ""
            self.print(f"--- {visible(request.name)}{number}")
            spans = SpanWriter(self._out, self._marks)
            for source, text in zip(output.sources, token_texts, strict=False):
                spans.write(source, text)
            spans.close()
            self.print("" if output.trace is not None else "\n")
        else:
            self._end_line()
        if output.trace is not None:
            trace = [dataclasses.asdict(decision) for decision in output.trace]
            self.print("\n" + decisions_table(trace, self._name_of))

    def close(self) -> None:
        self._end_line()

    def say(self, text: str) -> None:
        if not self._quiet:
            self.print(("\n" if self._route else "") + text)

    def print(self, text: str) -> None:
        print(text, file=self._out, flush=True)

    def _name_of(self, token: int) -> str:
        return str(self._pair.slm.tokenizer.decode([token]))

    def _end_line(self) -> None:
        if self._began:
            self._began = False
            self._streamed.close()
            self.print("")


class JsonSink:
    """For programs: a JSON line as each completion finishes; for people, progress on stderr."""

    def __init__(self, writer: LineWriter, num_outputs: int, *, quiet: bool) -> None:
        self._writer, self._quiet = writer, quiet
        self._progress: Any = None
        if not writer.to_file:
            set_encoding(sys.stdout, encoding="utf-8")  # JSON is, whatever the locale
        # A bar and lines on the same terminal would tear each other apart.
        alone = writer.to_file or not sys.stdout.isatty()
        if num_outputs > 1 and alone and not quiet and sys.stderr.isatty():
            self._progress = make_bar("writing", num_outputs)

    def open(self) -> None:
        self._writer.open()
        if self._progress is not None:
            self._progress.start()

    def token(self, event: TokenEvent) -> None:
        pass

    def finish(self, request: Request, output: RequestOutput, token_texts: list[str]) -> None:
        record = output_to_dict(output, token_texts)
        if request.line is not None:
            record = {"id": request.id, "line": request.line} | record
        self._writer.write(to_json_line(record))
        if self._progress is not None:
            self._progress.advance(self._progress.task_ids[0])

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._writer.close()

    def say(self, text: str) -> None:
        if not self._quiet:
            print(text, file=sys.stderr)


def describe_route(route: "Route") -> str:
    """`router entropy, per token, threshold 0.45`."""
    if route.router.constant is not None:
        return f"router {route.router.name}"
    return f"router {route.router.name}, per {route.granularity}, threshold {route.threshold:g}"

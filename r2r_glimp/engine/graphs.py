"""Passes of fixed shape, as one CUDA graph each: a few new tokens of a few rows, and the token that
follows each row drawn and scored.

    rows ─fill─▶ RowBuffer ─one copy─▶ static tensors ─replay─▶ hidden states, logits: stay there
                                                              └▶ token, finite, score ─one copy─▶

A batch is padded to the next shape, `num_rows` rows of `num_new` tokens. The body is a plain
function on the static tensors. Captured once, a CUDA graph repeats it; uncaptured it can be called
as it is, on any device, and that is how it is checked.

Shape suffixes: N rows, T = N x S tokens, V vocabulary, H hidden size.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from r2r_glimp.attention.gather import Row
from r2r_glimp.attention.paged import PagedContext
from r2r_glimp.attention.rows import BatchTensors, RowBuffer
from r2r_glimp.core import SamplingParams
from r2r_glimp.engine.runner import Drawn, ModelRunner, Rows
from r2r_glimp.engine.sampling import NUM_COLUMNS, columns, draw, likeliest
from r2r_glimp.kv.pool import BLOCK_SIZE
from r2r_glimp.models.pair import LoadedModel
from r2r_glimp.routing.routers import Router
from r2r_glimp.routing.signals import Signals

log = logging.getLogger(__name__)

NEW = (1, 4, 16, 64)  # new tokens of a row: decode, catch-up and drafts, a step's catch-up
MAX_TOKENS = 256  # of a shape: up to there a pass of a large model takes as long as for one token

Body = Callable[[], None]
Capture = Callable[[Body], Body]  # from a body to what repeats it


@dataclass(frozen=True, slots=True)
class Draws:
    """How the token after each row is drawn, and the router's random numbers."""

    params: list[SamplingParams]
    uniforms: list[float]
    router_uniforms: list[float]


@dataclass(frozen=True, slots=True)
class Shape:
    """What a graph is captured for. `drawn`: some row has a temperature."""

    num_rows: int
    num_new: int
    drawn: bool

    @property
    def num_tokens(self) -> int:
        return self.num_rows * self.num_new


class Graphs:
    """One model's passes of fixed shape, captured by `warm_up` or at their first use.

    Args:
        runner: of the model.
        bind: attention under tensors whose values change between passes.
        max_rows: sequences that run at once.
        max_length: tokens a sequence may have.
        capture: makes a CUDA graph of a body; or returns the body itself.
        router: scores the rows of passes of one new token; its `score` can be captured.
    """

    def __init__(
        self,
        runner: ModelRunner,
        bind: Callable[[BatchTensors], PagedContext],
        max_rows: int,
        max_length: int,
        capture: Capture,
        router: Router | None = None,
    ) -> None:
        self.runner = runner
        self.router = router
        self.bind = bind
        sizes = [*(2**i for i in range((max_rows - 1).bit_length())), max_rows]
        self.sizes = [size for size in sizes if size <= MAX_TOKENS]
        self.table_width = -(-max_length // BLOCK_SIZE)
        self.capture = capture
        self.passes: dict[Shape, FixedPass] = {}
        self.outputs: dict[int | str, Tensor] = {}
        self.failure: str | None = None
        self._layers = runner.kept_layers  # when the passes were captured

    def warm_up(self, lengths: Iterable[int] = NEW) -> None:
        """Capture what a run is sure to need, the largest shape first: smaller ones fit its memory.

        Args:
            lengths: new tokens of a row, of `NEW`.
        """
        shapes = [
            Shape(rows, new, drawn=False)
            for rows in self.sizes
            for new in lengths
            if rows * new <= MAX_TOKENS
        ]
        for shape in sorted(shapes, key=lambda s: s.num_tokens, reverse=True):
            self._get(shape)

    def run(self, rows: list[Row], wanted: list[int], draws: Draws) -> Rows | None:
        """A forward pass, as `ModelRunner.forward` does it, with the next tokens drawn; None if no
        shape takes the batch. What comes back holds until the next pass."""
        shape = self._shape_for(rows, draws)
        fixed = None if shape is None else self._get(shape)
        return None if fixed is None else fixed.run(rows, wanted, draws)

    def _shape_for(self, rows: list[Row], draws: Draws) -> Shape | None:
        """The smallest shape that holds the batch."""
        longest = max(len(row.tokens) for row in rows)
        num_new = next((new for new in NEW if longest <= new), None)
        num_rows = next((size for size in self.sizes if len(rows) <= size), None)
        if num_new is None or num_rows is None or num_rows * num_new > MAX_TOKENS:
            return None
        if max(row.end for row in rows) > self.table_width * BLOCK_SIZE:
            return None
        drawn = any(params.temperature > 0 for params in draws.params)
        return Shape(num_rows, num_new, drawn)

    def _get(self, shape: Shape) -> "FixedPass | None":
        """The pass of a shape; None if this model cannot be captured."""
        if self._layers != self.runner.kept_layers:  # a router asked for one more
            self.passes.clear()
            self._layers = self.runner.kept_layers
        if shape not in self.passes and self.failure is None:
            try:
                self.passes[shape] = FixedPass(self, shape)
            except RuntimeError as error:  # torch.OutOfMemoryError is one
                self.failure = str(error).splitlines()[0]
                log.warning(
                    "%s runs without CUDA graphs and is slower: a pass of %d rows x %d tokens "
                    "cannot be captured (%s)",
                    self.runner.loaded.name, shape.num_rows, shape.num_new, self.failure,
                )  # fmt: skip
        return self.passes.get(shape)


class FixedPass:
    """A pass of one shape: its static tensors, its body, and what repeats it."""

    def __init__(self, graphs: Graphs, shape: Shape) -> None:
        self.runner, self.outputs, self.shape = graphs.runner, graphs.outputs, shape
        self.router = graphs.router if shape.num_new == 1 else None
        device = self.runner.loaded.device
        self.buffer = RowBuffer(
            shape.num_rows, shape.num_tokens, graphs.table_width, device, NUM_COLUMNS + 1
        )
        with self.runner.on_device():
            self.buffer.fill([], shape.num_new)
            self.buffer.send()
        self.tensors = self.buffer.tensors(shape.num_new)
        self.context = graphs.bind(self.tensors)
        self.result_N3 = torch.zeros(shape.num_rows, 3, dtype=torch.float64, device=device)
        self.repeat = graphs.capture(self.body)

    @torch.inference_mode()
    def body(self) -> None:
        """From the static tensors to the static outputs; reads nothing back."""
        hidden_TH, logits_TV, layers = self.runner.call(
            self.buffer.ids_T, self.buffer.positions_T, 0, self.context
        )
        made: list[tuple[int | str, Tensor]] = [("hidden", hidden_TH), ("logits", logits_TV)]
        for name, x_TX in (*made, *layers.items()):
            if name not in self.outputs:  # never while capturing: a warm-up comes first
                self.outputs[name] = x_TX.new_empty(MAX_TOKENS, x_TX.shape[-1])
            self.outputs[name][: len(x_TX)].copy_(x_TX)
        if self.shape.num_new > 1:
            last_N = self.tensors.first_N + (self.tensors.new_N - 1).clamp_min(0)
            hidden_TH, logits_TV = (x.index_select(0, last_N) for x in (hidden_TH, logits_TV))
        columns_CN = self.buffer.columns_CN
        tokens_N = likeliest(logits_TV)
        if self.shape.drawn:
            drawn_N = draw(logits_TV, columns_CN[:NUM_COLUMNS])
            tokens_N = torch.where(columns_CN[0] > 0, drawn_N, tokens_N)
        finite_N = ~logits_TV.amax(-1).isnan()  # a maximum with NaN is NaN
        scores_N = torch.zeros_like(columns_CN[0])
        if self.router is not None:
            signals = Signals(hidden_TH, logits_TV, tokens_N, [], columns_CN[NUM_COLUMNS], layers)
            scores_N = self.router.score(signals)
        for i, value_N in enumerate((tokens_N, finite_N, scores_N)):
            self.result_N3[:, i].copy_(value_N)

    def run(self, rows: list[Row], wanted: list[int], draws: Draws) -> Rows:
        """Fill, send, repeat, and read back the one tensor that the host needs."""
        S = self.shape.num_new
        told = columns(draws.params, draws.uniforms)
        with self.runner.on_device():
            self.buffer.fill(rows, S, [*told, draws.router_uniforms])
            self.buffer.send()
            self.repeat()
        num_tokens = self.shape.num_tokens
        layers = {n: x[:num_tokens] for n, x in self.outputs.items() if isinstance(n, int)}
        everything = Rows(
            self.outputs["hidden"][:num_tokens], self.outputs["logits"][:num_tokens], layers
        )
        ends = [i * S + len(row.tokens) for i, row in enumerate(rows)]
        picked = everything.pick(
            [j for end, num in zip(ends, wanted, strict=True) for j in range(end - num, end)]
        )
        if max(wanted) <= 1:
            results = [r for r, num in zip(self.result_N3.tolist(), wanted, strict=False) if num]
            picked.drawn = Drawn(
                tokens=[int(token) for token, _, _ in results],
                finite=[bool(finite) for _, finite, _ in results],
                scores=[score for _, _, score in results],
                router=self.router,
            )
        return picked


class CudaCapture:
    """Captures bodies as CUDA graphs on one device, which share memory: no two run at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, body: Body) -> Body:
        with torch.cuda.device(self.device):
            aside, current = torch.cuda.Stream(), torch.cuda.current_stream()
            aside.wait_stream(current)
            with torch.cuda.stream(aside):
                for _ in range(2):  # libraries make their workspaces, Triton compiles
                    body()
            current.wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                body()
        return graph.replay


NONE: tuple[Graphs | None, Graphs | None] = (None, None)


def make_graphs(
    runners: tuple[ModelRunner, ModelRunner],
    router: Router,
    max_rows: int,
    max_lengths: list[int],
) -> tuple[Graphs | None, Graphs | None]:
    """The captured passes of both models, warmed up; None for a model that has none.

    Args:
        runners: with their planes allocated; one object if one model plays both roles.
        router: the engine's; passes of the SLM score by it where that can be captured.
        max_rows: sequences that run at once.
        max_lengths: tokens a timeline may have, for each model.
    """
    captures: dict[torch.device, Capture | None] = {}
    graphs: list[Graphs | None] = []
    for runner, max_length in zip(runners, max_lengths, strict=True):
        if runner.backend is None:  # computed elsewhere
            graphs.append(None)
            continue
        device, bind = runner.loaded.device, getattr(runner.backend, "bind", None)
        if device not in captures:
            captures[device] = capture_on(device)
        capture = captures[device]
        if graphs and runner is runners[0]:
            graphs.append(graphs[0])
        elif bind is None or capture is None:
            graphs.append(None)
        elif reason := obstacle(runner.loaded):
            log.warning("%s runs without CUDA graphs and is slower: %s", runner.loaded.name, reason)
            graphs.append(None)
        else:
            scorer = router if runner is runners[0] and router.capturable else None
            made = Graphs(runner, bind, max_rows, max_length, capture, scorer)
            runner.paths += f", CUDA graphs for up to {made.sizes[-1]} rows"
            graphs.append(made)
    slm, llm = graphs
    if slm is not None:
        slm.warm_up(NEW[:1])
    if llm is not None:
        llm.warm_up()
    return slm, llm


def capture_on(device: torch.device) -> Capture | None:
    """What captures on a device; None where nothing can be captured."""
    return CudaCapture(device) if device.type == "cuda" else None


def obstacle(loaded: LoadedModel) -> str | None:
    """Why a model is not captured, as far as its config tells; None if it is."""
    if loaded.is_split:
        return "it is split over processes, whose passes wait for each other"
    config = loaded.model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {
        rope.get("rope_type"),
        *(r.get("rope_type") for r in rope.values() if isinstance(r, dict)),
    }
    if "dynamic" in kinds:
        return "its rotary embedding is computed anew as texts grow (rope_type dynamic)"
    return None

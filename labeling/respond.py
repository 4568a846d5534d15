"""Stage respond: an answer to a question, by the LLM, by the routed pair, or given in the input."""

from dataclasses import dataclass
from typing import Literal

from labeling.batch import Task, Write, Written
from labeling.formats import Question
from labeling.setting import Setting, seed_of
from r2r_glimp.core import DataError, Decision, RoutingParams
from r2r_glimp.routing.tags import Section


@dataclass(slots=True, kw_only=True)
class Response:
    """A whole answer; position i is token i of `tokens`, everywhere."""

    id: str
    question: Question
    prompt: list[int]
    tokens: list[int]
    pieces: list[str]  # the text that each token made readable
    complete: list[bool]  # whether no character is cut after a token
    text: str
    section: Section  # where the prompt left the thinking
    answer: str | None
    trace: list[Decision] | None = None

    @property
    def where(self) -> str:
        """For messages."""
        return f"{self.question.where} (response {self.id})"

    def before(self, position: int) -> list[int]:
        """Prompt and response up to a position: what a branch starts from."""
        return self.prompt + self.tokens[:position]


@dataclass(frozen=True, slots=True)
class Dropped:
    """An answer that cannot be labeled, and why."""

    id: str
    reason: Literal["unfinished", "no_answer"]


def respond(question: Question, index: int, setting: Setting) -> Task[Response | Dropped]:
    """The `index`-th answer to a question.

    Raises:
        DataError: the prompt or the given response does not fit, or never closes its thinking.
    """
    id = f"{question.id}/{index}"
    prompt = setting.encode(question.prompt, question.where)
    if setting.config.responses.by == "input":
        return _finish(id, question, prompt, _given(question, prompt, setting), setting)
    written: Written
    [written] = yield [_request(id, question, prompt, setting)]
    return _finish(id, question, prompt, written, setting)


def make_response(
    id: str, question: Question, prompt: list[int], written: Written, setting: Setting
) -> Response:
    """What was written as a response, whole or not."""
    text = setting.text(written.tokens)
    pieces, complete = setting.pieces(prompt, written.tokens)
    return Response(
        id=id,
        question=question,
        prompt=prompt,
        tokens=written.tokens,
        pieces=pieces,
        complete=complete,
        text=text,
        section=setting.section(prompt),
        answer=setting.extract(text) if setting.extract else None,
        trace=written.trace,
    )


def _finish(
    id: str, question: Question, prompt: list[int], written: Written, setting: Setting
) -> Response | Dropped:
    response = make_response(id, question, prompt, written, setting)
    text, tags = response.text, setting.tags
    thinks = tags is not None and (response.section == "thinking" or tags.open in text)
    if not written.finished or (thinks and str(setting.close) not in text):
        return Dropped(id, "unfinished")
    if setting.config.verifier.kind == "answer" and response.answer is None:
        return Dropped(id, "no_answer")
    return response


def _request(id: str, question: Question, prompt: list[int], setting: Setting) -> Write:
    config = setting.config
    responses = config.responses
    routing = RoutingParams(router="llm")
    if setting.on_policy:
        routing = RoutingParams(
            router=setting.router,
            granularity=responses.granularity,
            threshold=responses.threshold,
            delimiter=config.delimiter,
            max_step_tokens=config.max_step_tokens,
            trace=config.verifier.kind == "identical",
        )
    seed = seed_of("response", responses.sampling.seed, id)
    return Write(
        stage="respond",
        where=question.where,
        prompt=prompt,
        sampling=responses.sampling.sampling(responses.max_tokens, seed),
        routing=routing,
    )


def _given(question: Question, prompt: list[int], setting: Setting) -> Written:
    """The input's own response; a tag that the prompt has opened is not opened again."""
    assert question.response is not None
    text, key = question.response, setting.config.source.response_key
    if setting.tags is not None:
        section = setting.section(prompt)
        if section == "thinking":
            text = text.removeprefix(setting.tags.open).removeprefix("\n")
        if section != "answer" and setting.tags.close not in text:
            raise DataError(
                f"{question.where}: key {key!r} never closes its thinking "
                f"(no {setting.tags.close}): leave the row out, or add the tag"
            )
    tokens = setting.slm.tokenizer.encode(text, add_special_tokens=False)
    tokens.append(setting.slm.tokenizer.eos_token_id)
    total = len(prompt) + len(tokens)
    if total >= setting.room:
        raise DataError(
            f"{question.where}: prompt and response have {total:,} tokens, but only "
            f"{setting.room:,} fit (context of the pair, and engine.kv_memory): leave the row out"
        )
    return Written(tokens, finished=True)

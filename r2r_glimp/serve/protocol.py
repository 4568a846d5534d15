"""What clients send: OpenAI's requests, a few fields of vLLM's, and ours. Every number is bounded.

    OpenAI    model messages prompt temperature top_p n stop seed max_tokens logprobs stream ...
    vLLM      top_k min_p stop_token_ids ignore_eos chat_template_kwargs return_token_ids
    ours      granularity router threshold target_llm_share max_llm_share answer_by speculate
              max_step_tokens max_thinking_tokens return_routing

Types are strict: `"temperature": "1"` is refused. A field of OpenAI's or vLLM's that changes the
text and is not done here is refused by its name; a field nobody knows is ignored.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from r2r_glimp.core import AnswerBy, Granularity

MAX_COMPLETIONS = 128  # of one request
MAX_TEXT = 4 * 2**20  # characters of one text; the body's cap is what usually bites first
MAX_TOKENS = 2**31

Share = Annotated[float, Field(ge=0, le=1)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Text = Annotated[str, Field(max_length=MAX_TEXT)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=2**20)]

_TYPE = re.compile(r"(body|str|int|constrained-.*|.*\[.*)$")

# Fields that would change the text and are not done here, with the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none"),
    "functions": (None, []),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "logit_bias": (None, {}),
    "min_tokens": (None, 0),
    "modalities": (None, ["text"]),
    "presence_penalty": (None, 0),
    "prompt_logprobs": (None,),
    "repetition_penalty": (None, 1),
    "response_format": (None, {"type": "text"}),
    "structured_outputs": (None,),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "use_beam_search": (None, False),
}


class Body(BaseModel):
    """A request's JSON object."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class StreamOptions(Body):
    """What a stream tells besides the text."""

    include_usage: bool = False


class Generation(Body):
    """What both kinds of generation share. A field left out, or null, is the server's default."""

    model: Annotated[str, Field(max_length=256)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_COMPLETIONS)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31)] | None = None
    min_p: Share | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    ignore_eos: bool = False
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False

    router: Annotated[str, Field(max_length=256)] | None = None
    granularity: Granularity | None = None
    threshold: float | None = None
    target_llm_share: Share | None = None
    max_llm_share: Share | None = None
    answer_by: AnswerBy | None = None
    max_step_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    max_thinking_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    speculate: Annotated[int, Field(ge=0, le=64)] | None = None
    return_routing: bool = False

    @model_validator(mode="after")
    def _check(self) -> "Generation":
        for name, value in (self.model_extra or {}).items():
            if name in _NEUTRAL and value not in _NEUTRAL[name]:
                raise ValueError(f"{name} is not supported by this server: leave it out")
        if self.threshold is not None and self.target_llm_share is not None:
            raise ValueError("threshold and target_llm_share contradict each other: give one")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream: true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to report beside each token; None for no logprobs at all."""
        raise NotImplementedError

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens


class TextPart(Body):
    """A part of a message; only text is understood."""

    type: Literal["text"]
    text: Text


class Message(Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=1024)]

    @model_validator(mode="after")
    def _check(self) -> "Message":
        if (self.model_extra or {}).get("tool_calls"):
            raise ValueError("tool_calls are not supported by this server")
        return self

    def to_dict(self) -> dict[str, str]:
        """As the chat template takes it."""
        content = self.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class TemplateArguments(BaseModel):
    """Variables of a chat template that clients may set; no other reaches it."""

    model_config = ConfigDict(strict=True, extra="forbid")

    enable_thinking: bool | None = None
    thinking: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high"] | None = None


Messages = Annotated[list[Message], Field(min_length=1, max_length=4096)]


class ChatRequest(Generation):
    """`POST /v1/chat/completions`."""

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    chat_template_kwargs: TemplateArguments | None = None

    @model_validator(mode="after")
    def _check_logprobs(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs: true")
        return self

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def token_limit(self) -> int | None:
        limit = self.max_completion_tokens
        return self.max_tokens if limit is None else limit


class CompletionRequest(Generation):
    """`POST /v1/completions`."""

    prompt: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_COMPLETIONS)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_COMPLETIONS)]
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, text or token ids."""
        prompt: Any = self.prompt
        is_one = isinstance(prompt, str) or isinstance(prompt[0], int)
        return [prompt] if is_one else prompt

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


class TokenizeRequest(Body):
    """`POST /tokenize`: a text as it is, or messages through the chat template."""

    model: Annotated[str, Field(max_length=256)] | None = None
    prompt: Text | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _check(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give prompt or messages")
        return self


class DetokenizeRequest(Body):
    """`POST /detokenize`."""

    model: Annotated[str, Field(max_length=256)] | None = None
    tokens: Annotated[list[TokenId], Field(max_length=2**20)]


class ErrorBody(BaseModel):
    """What an error says."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """OpenAI's form of an error."""

    error: ErrorBody


def describe_problems(problems: list[dict[str, Any]], shown: int = 3) -> tuple[str, str | None]:
    """Validation errors as one line, and the first one's field; what was sent is not repeated."""
    lines = [_describe(problem) for problem in problems]
    lines = list(dict.fromkeys(lines))
    more = f" (and {len(lines) - shown} more)" if len(lines) > shown else ""
    path = _path(problems[0])
    return "; ".join(lines[:shown]) + more, str(path[0]) if path else None


def _path(problem: dict[str, Any]) -> list[Any]:
    """Where in the body; names of types, which pydantic puts there for unions, left out."""
    return [part for part in problem["loc"] if not _TYPE.match(str(part))]


def _describe(problem: dict[str, Any]) -> str:
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "json_invalid":
        return f"the body is not valid JSON: {problem['ctx']['error']}"[:200]
    where = ".".join(str(part)[:64] for part in _path(problem))
    message = message[:1].lower() + message[1:300]
    return f"{where}: {message}" if where else message

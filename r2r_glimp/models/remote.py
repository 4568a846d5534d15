"""A model behind a server: what the pair knows of it, and how it is asked.

Stands where a loaded model stands: tokenizer, context, fingerprint. It has no weights here and no
plane in the KV manager; the server's prefix cache is what makes catching up cheap.
"""

import hashlib
import logging
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NoReturn

from transformers import PreTrainedTokenizerFast

from r2r_glimp.core import UsageError
from r2r_glimp.models.fingerprint import Fingerprint
from r2r_glimp.models.loading import load_tokenizer
from r2r_glimp.models.vocabulary import tokenizer_sha256
from r2r_glimp.remote.api import DIALECTS, Ask, Completions, Reply, SGLang, Text
from r2r_glimp.remote.client import Client, Refused, RemoteError
from r2r_glimp.remote.spec import RemoteSpec

log = logging.getLogger(__name__)
_KEY_WRONG = (401, 403)
_PROBED = 256  # tokens of the text by which two tokenizers are compared


@dataclass(slots=True, eq=False)
class RemoteModel:
    """A model behind a server.

    Attributes:
        tokenizer: its own, or the other model's where the server takes and gives text.
        dialect: how it is asked.
        context_length: tokens it reads at most.
        no_ids: why token ids cannot be exchanged with it; None if they can.
    """

    spec: RemoteSpec
    client: Client
    name_there: str
    tokenizer: PreTrainedTokenizerFast
    dialect: Completions | SGLang | Text
    context_length: int
    no_ids: str | None = None

    @classmethod
    def connect(cls, spec: RemoteSpec, other: PreTrainedTokenizerFast | None) -> "RemoteModel":
        """Ask a server what it has.

        Args:
            other: the other model's tokenizer, which holds where the spec names none.

        Raises:
            UsageError: it has no such model, the tokenizer or the context is not known, or a key
                or package is missing.
            CheckpointError: the tokenizer cannot be loaded.
            RemoteError: it does not answer.
        """
        client = Client(spec)
        try:
            return cls._connect(spec, client, other)
        except Refused as error:
            client.close()
            if error.status in _KEY_WRONG:
                hint = "" if spec.api_key_env else ": name the variable of its key in api_key_env"
                raise UsageError(f"{error}{hint}") from None
            raise UsageError(str(error)) from None
        except BaseException:
            client.close()
            raise

    @classmethod
    def _connect(
        cls, spec: RemoteSpec, client: Client, other: PreTrainedTokenizerFast | None
    ) -> "RemoteModel":
        cards = _list_models(client, spec)
        served = ", ".join(cards) or "nothing"
        if spec.model is None and len(cards) != 1:
            raise UsageError(f"{spec.url} serves {served}: say which (model)")
        name = next(iter(cards)) if spec.model is None else spec.model
        if spec.tokenizer is None and other is None:
            raise UsageError(
                f"the tokenizer of {spec.name} is not known: name a folder or Hub id in tokenizer"
            )
        tokenizer = other if spec.tokenizer is None else load_tokenizer(spec.tokenizer)
        assert tokenizer is not None
        # A server that loads what it is asked for lists only what it has loaded.
        dialect, problem = None, RemoteError("")
        try:
            dialect = _find_dialect(client, spec, name, tokenizer)
        except RemoteError as error:
            problem = error
        if cards and name not in cards and (dialect is None or dialect.takes_ids):
            raise UsageError(f"{spec.url} does not serve {name!r}: it serves {served}")
        if dialect is None:
            raise problem
        no_ids = None
        if not dialect.takes_ids:
            no_ids = f"{spec.url} takes and gives text"
        elif spec.tokenizer is None:
            no_ids = _compare(client, spec, name, tokenizer)
            if no_ids is not None:
                dialect = DIALECTS["text"]
        if no_ids is not None:
            log.info("%s is asked for text: %s", spec.name, no_ids)
        length = spec.context_length or _context_length(cards.get(name, {}))
        if length is None:
            raise UsageError(
                f"{spec.url} does not say how long the context of {name} is: give context_length"
            )
        return cls(spec, client, name, tokenizer, dialect, length, no_ids)

    @property
    def name(self) -> str:
        return f"{self.spec.url}#{self.name_there}"

    @property
    def fingerprint(self) -> Fingerprint:
        """What is known of it: nothing of its weights."""
        return Fingerprint(
            name_or_path=self.name,
            architecture="remote",
            hidden_size=1,
            num_layers=1,
            vocab_size=self.vocab_size,
            tokenizer_sha256=tokenizer_sha256(self.tokenizer),
            weights_sha256=hashlib.sha256(self.name_there.encode()).hexdigest(),
        )

    @property
    def vocab_size(self) -> int:
        """Ids it may write: a padded vocabulary has no more with a text."""
        return len(self.tokenizer)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Ids that end a text; a server that knows more ends it itself."""
        eos = self.tokenizer.eos_token_id
        return frozenset() if eos is None else frozenset([eos])

    def submit(self, ask: Ask) -> "Future[Reply]":
        """Have something written; a failure is a RemoteError of one line."""
        return self.client.submit(ask, self.dialect, self.name_there, self.vocab_size)

    def check_logprobs(self) -> None:
        """Raises UsageError unless the server tells log-probabilities, of which routing is made."""
        ask = Ask(tokens=self.tokenizer.encode("A"), text="A", max_tokens=1, logprobs=True)
        try:
            top = self.submit(ask).result().top
        except Refused as error:
            raise UsageError(f"{self.name} tells no logprobs: {error}") from None
        if len(top) < 2:
            raise UsageError(
                f"{self.spec.url} tells no logprobs of {self.name_there}, and of an SLM behind a "
                "server the router sees nothing else: choose one that does, or load the SLM here"
            )

    def _not_here(self, what: str) -> NoReturn:
        raise UsageError(f"{self.name} is behind a server: its {what} cannot be had here")

    @property
    def model(self) -> Any:
        self._not_here("weights")

    @property
    def device(self) -> Any:
        self._not_here("device")

    @property
    def dtype(self) -> Any:
        self._not_here("dtype")

    @property
    def num_parameters(self) -> int:
        self._not_here("number of parameters")


def _list_models(client: Client, spec: RemoteSpec) -> dict[str, dict[str, Any]]:
    """What the server says of each model it serves; nothing where it cannot list them."""
    try:
        reply = client.get(f"{spec.url}/models")
    except RemoteError as error:
        if spec.model is None or (isinstance(error, Refused) and error.status in _KEY_WRONG):
            raise
        log.info("%s does not list its models: %s", spec.url, error)
        return {}
    try:
        return {str(card["id"]): dict(card) for card in reply["data"]}
    except (LookupError, TypeError, ValueError):
        raise UsageError(
            f"{spec.url}/models is no list of models: is it the base of an OpenAI API (…/v1)?"
        ) from None


def _find_dialect(
    client: Client, spec: RemoteSpec, name: str, tokenizer: PreTrainedTokenizerFast
) -> Completions | SGLang | Text:
    """How the server wants to be asked: it is made to write a token in each way."""
    ask = Ask(tokens=tokenizer.encode("A", add_special_tokens=False), text="A", max_tokens=1)
    tried = list(DIALECTS.values()) if spec.api == "auto" else [DIALECTS[spec.api]]
    for i, dialect in enumerate(tried):
        try:
            client.submit(ask, dialect, name, len(tokenizer), once_only=True).result()
        except RemoteError:
            if i == len(tried) - 1:
                raise
        else:
            log.info("%s is asked by %s", spec.name, dialect.name)
            return dialect
    raise AssertionError("no dialect")


def _compare(
    client: Client, spec: RemoteSpec, name: str, tokenizer: PreTrainedTokenizerFast
) -> str | None:
    """Why the server's tokenizer cannot be taken for this one; None if it can."""
    size = len(tokenizer)
    ids = list(range(0, size, max(1, size // _PROBED)))
    text = " ".join(str(tokenizer.decode([token])) for token in ids)
    text = text.encode("utf-8", "replace").decode()
    text += "".join(tokenizer.get_added_vocab())
    body = {"model": name, "prompt": text, "add_special_tokens": False}
    for root in (spec.url.removesuffix("/v1"), spec.url):
        try:
            theirs = client.post(f"{root}/tokenize", body)["tokens"]
        except (RemoteError, LookupError, TypeError):
            continue
        own = tokenizer.encode(text, add_special_tokens=False)
        if theirs == own:
            return None
        at = next(
            (i for i, pair in enumerate(zip(own, theirs, strict=False)) if pair[0] != pair[1]), 0
        )
        return (
            f"its tokenizer differs from the SLM's (token {at} of a sample is "
            f"{theirs[at : at + 1]} there, {own[at : at + 1]} here)"
        )
    return "it does not tell its tokenizer (/tokenize): name a folder or Hub id in tokenizer"


def _context_length(card: dict[str, Any]) -> int | None:
    length = card.get("max_model_len") or card.get("context_length")
    return length if isinstance(length, int) and length > 1 else None

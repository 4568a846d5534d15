"""The two models of a pair, loaded; how they compute is the engine's business."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from r2r_glimp.core import CheckpointError, Model, UsageError
from r2r_glimp.models.fingerprint import Fingerprint
from r2r_glimp.models.loading import load_model, make_fingerprint, require_fast
from r2r_glimp.models.placement import (
    SPLIT,
    per_model,
    process_device,
    resolve_device,
    resolve_dtype,
    split_processes,
)
from r2r_glimp.models.presets import read_preset
from r2r_glimp.models.remote import RemoteModel
from r2r_glimp.models.vocabulary import same_vocabulary
from r2r_glimp.remote.spec import RemoteSpec, is_remote

Place = str | os.PathLike[str] | Mapping[str, Any] | RemoteSpec


@dataclass(slots=True, eq=False)
class LoadedModel:
    """A causal language model in eval mode without gradients, its tokenizer, and what it is."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    fingerprint: Fingerprint

    @classmethod
    def from_model(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, *, name: str = "in-memory"
    ) -> "LoadedModel":
        """A model that is in memory; it is put in eval mode and its gradients are turned off.

        Raises:
            CheckpointError: the tokenizer is a slow one.
        """
        tokenizer = require_fast(tokenizer, name)
        model = model.eval().requires_grad_(False)
        return cls(model, tokenizer, make_fingerprint(model, tokenizer, name=name))

    @property
    def name(self) -> str:
        return self.fingerprint.name_or_path

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def is_split(self) -> bool:
        """Whether other processes hold parts of it."""
        return (getattr(self.model, "tp_size", None) or 1) > 1

    @property
    def context_length(self) -> int:
        """Tokens that positions reach, stretched by rope scaling where the config says how far.

        Raises:
            CheckpointError: the config does not say.
        """
        config = self.model.config.get_text_config()
        length = getattr(config, "max_position_embeddings", None)
        if not isinstance(length, int) or length < 1:
            raise CheckpointError(
                f"{self.name} does not say how long its context is (max_position_embeddings)"
            )
        # Qwen's stretched configs keep the unstretched max_position_embeddings
        rope = getattr(config, "rope_parameters", None) or {}
        original, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
        if isinstance(original, int) and isinstance(factor, int | float):
            length = max(length, int(original * factor))
        return length

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Ids that end a text: of the generation config, the config and the tokenizer together."""
        config = self.model.config.get_text_config()
        said = (
            getattr(self.model.generation_config, "eos_token_id", None),
            getattr(config, "eos_token_id", None),
            self.tokenizer.eos_token_id,
        )
        ids = (one for ids in said for one in (ids if isinstance(ids, list | tuple) else [ids]))
        return frozenset(one for one in ids if one is not None)

    @property
    def num_parameters(self) -> int:
        """Weights, tied ones counted once."""
        return sum(parameter.numel() for parameter in self.model.parameters())


AnyModel = LoadedModel | RemoteModel


@dataclass(slots=True, eq=False)
class ModelPair:
    """The SLM and the LLM. Both may be the same object: the same checkpoint is loaded once. Either
    may be behind a server."""

    slm: AnyModel
    llm: AnyModel
    _same_vocabulary: bool | None = field(default=None, init=False, repr=False)

    def __getitem__(self, model: Model) -> AnyModel:
        return self.llm if model else self.slm

    @property
    def local(self) -> tuple[Model, ...]:
        """The models that are computed here."""
        return tuple(m for m in Model if isinstance(self[m], LoadedModel))

    @property
    def same_vocabulary(self) -> bool:
        """True if both read the same token ids: every token has the same id in both, however far
        the embeddings are padded, and a server takes and gives ids."""
        if self._same_vocabulary is None:  # compared once: it takes a tenth of a second
            same = all(not isinstance(one, RemoteModel) or one.no_ids is None for one in self)
            same = same and not isinstance(self.slm, RemoteModel)
            self._same_vocabulary = same and same_vocabulary(self.slm.tokenizer, self.llm.tokenizer)
        return self._same_vocabulary

    @property
    def apart(self) -> str:
        """Why the models do not read the same token ids, as the end of a sentence."""
        for one in self:
            if isinstance(one, RemoteModel) and one.no_ids is not None:
                return f"{one.name} cannot share it: {one.no_ids}"
        if isinstance(self.slm, RemoteModel):
            return "an SLM behind a server is asked once for a step, not for every token"
        return "the tokenizers of this pair differ"

    def __iter__(self) -> Iterator[AnyModel]:
        return iter((self.slm, self.llm))

    @classmethod
    def from_pretrained(
        cls,
        slm: Place,
        llm: Place,
        *,
        device: str | Mapping[str, str] | Sequence[str] = "auto",
        dtype: str | Mapping[str, str] | Sequence[str] = "auto",
        revision: str | Mapping[str, str | None] | Sequence[str | None] | None = None,
        slm_adapters: Sequence[str] = (),
        llm_adapters: Sequence[str] = (),
        llm_quantization: str | None = None,
        trust_remote_code: bool = False,
    ) -> "ModelPair":
        """Load both models. `device`, `dtype` and `revision` take one value, or one for each model:
        `{"slm": ..., "llm": ...}` or a pair.

        Args:
            slm: folder or Hub id of the small model; or where its server is: a `RemoteSpec`, a
                mapping of its fields, or `URL#MODEL`.
            llm: the same of the large model.
            device: auto, cpu, cuda or cuda:N; for the LLM also `tp`, split over the processes that
                torchrun started (tensor parallel, as the model's own plan says).
            dtype: auto (what the checkpoint says), float32, bfloat16 or float16.
            revision: branch, tag or commit of a Hub repository.
            slm_adapters: LoRA adapters (folders or Hub ids) merged into the small model, in order.
            llm_adapters: the same for the large model.
            llm_quantization: int8 or int4, the LLM's linear layers by torchao; where that is faster
                or saves memory that is needed.
            trust_remote_code: run Python code that comes with a model.

        Raises:
            UsageError: an argument makes no sense here, or a package is not installed.
            CheckpointError: a model or adapter is missing, broken, unsafe or does not fit.
            EngineError: a device has too little memory, or a server does not answer.
        """
        specs = [_remote(one, m) for one, m in zip((slm, llm), Model, strict=True)]
        asked = per_model("device", device, "auto")
        num_processes = 1
        if SPLIT in asked:
            if asked[0] == SPLIT or llm_adapters or specs[Model.LLM] is not None:
                raise UsageError(
                    f"device={SPLIT!r} is for an LLM that is computed here, without adapters: "
                    f"device=auto,{SPLIT} splits it over the processes of torchrun"
                )
            num_processes = split_processes()
            asked = (process_device(), process_device())
        if llm_quantization is not None and (
            llm_adapters or num_processes > 1 or specs[Model.LLM] is not None
        ):
            raise UsageError(
                "llm_quantization is for an LLM that is computed here, without adapters, in one "
                "process: merge adapters into a checkpoint first"
            )
        devices = [resolve_device(d) for d in asked]
        dtypes = [resolve_dtype(d) for d in per_model("dtype", dtype, "auto")]
        revisions = per_model("revision", revision, None)
        names = [
            "" if _remote(one, m) else os.fspath(cast(str, one))
            for m, one in zip(Model, (slm, llm), strict=True)
        ]
        adapters = (_names("slm_adapters", slm_adapters), _names("llm_adapters", llm_adapters))
        wanted = [
            {
                "device": devices[m],
                "dtype": dtypes[m],
                "revision": revisions[m],
                "adapters": adapters[m],
                "quantization": llm_quantization if m is Model.LLM else None,
            }
            for m in Model
        ]

        def load(model: Model, other: PreTrainedTokenizerFast | None) -> AnyModel:
            spec = specs[model]
            if spec is None:
                loaded = load_model(
                    names[model],
                    trust_remote_code=trust_remote_code,
                    num_processes=num_processes if model is Model.LLM else 1,
                    **wanted[model],
                )
                return LoadedModel(*loaded)
            if adapters[model]:
                raise UsageError(f"{model.label}_adapters: {spec.url} must be started with them")
            return RemoteModel.connect(spec, other)

        # What is here comes first: a server may be asked whether it has the same tokenizer.
        if specs[Model.SLM] is not None and specs[Model.LLM] is None:
            there = load(Model.LLM, None)
            pair = cls(slm=load(Model.SLM, there.tokenizer), llm=there)
        else:
            here = load(Model.SLM, None)
            same = specs == [None, None] and _identity(names[0]) == _identity(names[1])
            same = same and wanted[0] == wanted[1] and num_processes == 1
            pair = cls(slm=here, llm=here if same else load(Model.LLM, here.tokenizer))
        if isinstance(pair.slm, RemoteModel):
            pair.slm.check_logprobs()
        return pair

    @classmethod
    def from_config(cls, name_or_path: str | os.PathLike[str], **overrides: Any) -> "ModelPair":
        """Load the pair that a YAML preset describes: a name of `configs/pairs`, or a path.

        Args:
            name_or_path: such as `abacus`.
            overrides: arguments of `from_pretrained` that replace the preset's.

        Raises:
            UsageError: no such preset, or it is not valid; and all that `from_pretrained` raises.
        """
        return cls.from_pretrained(**read_preset(os.fspath(name_or_path)) | overrides)


def _remote(place: Place, model: Model) -> RemoteSpec | None:
    """Where a model's server is; None if it has none."""
    if isinstance(place, RemoteSpec):
        return place
    if isinstance(place, os.PathLike) or not is_remote(place):
        return None
    return RemoteSpec.parse(place, model.label)


def _names(argument: str, names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str):
        raise UsageError(f"{argument}={names!r} is one string: give a list")
    return tuple(os.fspath(name) for name in names)


def _identity(name: str) -> str:
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name

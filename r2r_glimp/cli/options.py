"""Options that verbs share: which pair, which engine, how to sample, who writes what.

What contradicts itself is found here, before a model is loaded. No torch until `load_engine`.
"""

import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import Namespace

from r2r_glimp.cli.errors import say
from r2r_glimp.cli.parser import Parser, pick
from r2r_glimp.core import RoutingParams, SamplingParams, UsageError
from r2r_glimp.models.presets import read_preset
from r2r_glimp.remote.spec import is_remote
from r2r_glimp.routing.steps import delimiter_pattern

if TYPE_CHECKING:
    from r2r_glimp.engine.engine import Engine
    from r2r_glimp.models.pair import ModelPair
    from r2r_glimp.routing.routers import Router

log = logging.getLogger("r2r_glimp")

DEFAULT_PAIR = "abacus"
BASELINES = ("slm", "llm")


@dataclass(frozen=True, slots=True, kw_only=True)
class PairOptions:
    """Which two models.

    Args:
        pair: a name (configs/pairs/NAME.yaml) or a YAML file; `abacus` unless --slm and --llm are.
        slm: folder or Hub id of the small model, in place of the pair's; together with --llm.
        llm: folder or Hub id of the large model, in place of the pair's; together with --slm. Or
            URL#NAME of a server's, which may stand alone.
        device: auto, cpu, cuda or cuda:N; two, for SLM and LLM, with a comma between them. For the
            LLM also tp: split over the processes of torchrun.
        dtype: auto, float32, bfloat16 or float16; two with a comma between them.
        revision: branch, tag or commit of Hub repositories; two with a comma between them.
        slm_adapters: LoRA adapter (folder or Hub id) merged into the small model.
        llm_adapters: LoRA adapter (folder or Hub id) merged into the large model.
        llm_quantization: int8 or int4 weights of the large model, by torchao; on a CPU slower.
        trust_remote_code: run Python code that comes with a model.
    """

    pair: str | None = None
    slm: str | None = None
    llm: str | None = None
    device: str | None = None
    dtype: str | None = None
    revision: str | None = None
    slm_adapters: tuple[str, ...] = ()
    llm_adapters: tuple[str, ...] = ()
    llm_quantization: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How the engine runs.

    Args:
        kv_memory: memory for the KV of both models together: 512MiB, 2GiB, a share of what is free
            such as 0.85, or auto: that share of a GPU, 1GiB of a CPU.
        max_batch: sequences that run at once.
        max_batch_tokens: tokens one forward pass computes at most; longer prompts are chunked.
        llm_min_batch: rows that must wait for the LLM before it runs, while the SLM has work. By
            default it is chosen from what the passes of both models take here.
        llm_max_wait: with llm_min_batch, ticks after which the LLM runs all the same.
        prefix_cache: reuse the KV of earlier requests with the same beginning (default: true).
        kernels: auto, the fastest there is here; amx, avx512 or onednn, what multiplies bfloat16 on
            the CPU; or torch, the plain reference.
        graphs: on a GPU, repeat passes of few tokens as CUDA graphs (default: true).
    """

    kv_memory: str | int = "auto"
    max_batch: int = 32
    max_batch_tokens: int = 2048
    llm_min_batch: int | None = None
    llm_max_wait: int = 4
    prefix_cache: bool = True
    kernels: Literal["auto", "amx", "avx512", "onednn", "torch"] = "auto"
    graphs: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterOptions:
    """Which router.

    Args:
        router: entropy, margin, random, slm, llm, or the folder or Hub id of a trained router. By
            default the trained one that comes with the bundled pair, else entropy.
        entropy_top_k: with --router entropy, renormalise over this many tokens first
            (GlimpRouter's code: 20).
    """

    router: str | None = None
    entropy_top_k: int | None = None


def add_shared_options(parser: Parser) -> None:
    """The option groups of every verb that writes text."""
    models = parser.add_argument_group("models")
    parser.add_fields(models, PairOptions)
    routing = parser.add_argument_group("routing: who writes what")
    parser.add_fields(routing, RouterOptions)
    parser.add_fields(routing, RoutingParams, skip=("router",))
    sampling = parser.add_argument_group("sampling")
    parser.add_fields(sampling, SamplingParams)
    engine = parser.add_argument_group("engine")
    parser.add_fields(engine, EngineOptions)


def read_params(options: Namespace) -> tuple[SamplingParams, RoutingParams]:
    """Sampling and routing of the options, the router by its name.

    Raises:
        UsageError: a value is out of range, or options contradict each other.
    """
    pair, router = pick(PairOptions, options), pick(RouterOptions, options)
    if (pair.slm is None) != (pair.llm is None) and not is_remote(pair.llm):
        given, missing = ("slm", "llm") if pair.llm is None else ("llm", "slm")
        raise UsageError(f"--{given} stands alone: give --{missing} too, or only --pair")
    if router.entropy_top_k is not None and router.router != "entropy":
        raise UsageError("--entropy_top_k goes with --router entropy only")
    routing = pick(RoutingParams, options)
    check_routing(routing)
    return pick(SamplingParams, options), routing


def check_routing(routing: RoutingParams) -> None:
    """What contradicts itself whatever the pair.

    Raises:
        UsageError: a threshold for a router that has no use for one, or a delimiter that is none.
    """
    if routing.router in BASELINES and routing.threshold is not None:
        raise UsageError(
            f"threshold {routing.threshold} has no meaning for router {routing.router}, "
            "which never decides"
        )
    delimiter_pattern(routing.delimiter)


def load_engine(options: Namespace) -> "Engine":
    """The engine with its pair and default router.

    Raises:
        UsageError, CheckpointError, EngineError: the router, the pair or the memory do not fit.
    """
    from r2r_glimp.engine.engine import Engine

    routing = pick(RouterOptions, options)
    router = make_router(
        routing.router or default_router(options, options.granularity), routing.entropy_top_k
    )
    check_granularity(router, options.granularity)
    return Engine(
        load_pair(pick(PairOptions, options)), router=router, **asdict(pick(EngineOptions, options))
    )


def load_pair(options: PairOptions) -> "ModelPair":
    """Both models; what has to be fetched first is named on stderr.

    Raises:
        UsageError, CheckpointError, EngineError: as `ModelPair.from_pretrained`.
    """
    arguments = pair_arguments(options)
    _announce_fetching(arguments)
    from transformers.utils import logging as transformers_logging

    from r2r_glimp.models.pair import ModelPair

    if not log.isEnabledFor(logging.INFO):  # --debug lets the libraries talk
        transformers_logging.disable_progress_bar()
    return ModelPair.from_pretrained(**arguments)


def pair_arguments(options: PairOptions) -> dict[str, Any]:
    """Arguments of `ModelPair.from_pretrained`: the preset's, unless the options say otherwise.

    Raises:
        UsageError: no such preset, or it is not valid.
    """
    named = options.pair is not None or options.slm is None
    arguments = read_preset(options.pair or DEFAULT_PAIR) if named else {}
    if options.slm is not None:
        # Revisions and adapters belong to the models that are replaced.
        arguments = {
            k: v for k, v in arguments.items() if k in ("device", "dtype", "trust_remote_code")
        }
        arguments |= {"slm": options.slm, "llm": options.llm}
    elif options.llm is not None:  # a server instead of the preset's LLM
        arguments = {
            k: v for k, v in arguments.items() if k not in ("llm_adapters", "llm_quantization")
        }
        arguments["llm"] = options.llm
    for name in ("device", "dtype", "revision"):
        value = getattr(options, name)
        if value is not None:
            arguments[name] = value.split(",") if "," in value else value
    for name in ("slm_adapters", "llm_adapters", "llm_quantization", "trust_remote_code"):
        if getattr(options, name):
            arguments[name] = getattr(options, name)
    return arguments


def default_router(options: Namespace, granularity: str | None) -> str:
    """The trained router that lies beside the bundled pair, where it does; else `entropy`."""
    if options.pair in (None, DEFAULT_PAIR) and options.slm is None:
        beside = Path(read_preset(DEFAULT_PAIR)["slm"]).parent
        folder = beside / f"abacus-{granularity or 'token'}-router"
        if (folder / "config.json").is_file():
            return str(folder)
    return "entropy"


def make_router(name: str, entropy_top_k: int | None = None) -> "Router":
    """A router by name, or a trained one by folder or Hub id.

    Raises:
        UsageError: no such name.
        CheckpointError: not a router's folder or repository.
    """
    from r2r_glimp.routing.routers import NAMED_ROUTERS, EntropyRouter, named_router

    if name == "entropy":
        return EntropyRouter(entropy_top_k)
    if name in NAMED_ROUTERS or ("/" not in name and not os.path.exists(name)):
        return named_router(name)
    from r2r_glimp.hub import load_router

    return load_router(name)


def check_granularity(router: "Router", granularity: str | None) -> None:
    """Raises UsageError where a router was trained for the other granularity."""
    if granularity is not None and router.granularity not in (None, granularity):
        raise UsageError(
            f"router {router.name!r} was trained for granularity {router.granularity}, "
            f"not {granularity}: drop --granularity or choose another router"
        )


def _announce_fetching(arguments: dict[str, Any]) -> None:
    """Bring Hub models into the cache with a word and a progress bar; after that, silence."""
    from r2r_glimp.models.placement import per_model
    from r2r_glimp.models.source import locate

    revisions = per_model("revision", arguments.get("revision"), None)
    for role, revision in zip(("slm", "llm"), revisions, strict=True):
        name = arguments[role]
        if (
            not is_remote(name)
            and not Path(name).expanduser().exists()
            and name.count("/") == 1
            and not name.startswith((".", "/", "~"))
        ):
            say("info", f"looking for {name} in the Hub cache and on the Hub")
            locate(name, revision=revision, with_code=arguments.get("trust_remote_code", False))

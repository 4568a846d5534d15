"""What a client may name: the models `pair`, `pair:slm`, `pair:llm`, and routers that are loaded.

A name from a client is only ever looked up here; it never becomes a path or a Hub id.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any, Literal, cast

from openai.types import Model as ModelCard

from r2r_glimp.core import Granularity, Model, RoutingParams, UsageError
from r2r_glimp.engine.engine import Engine
from r2r_glimp.models.pair import AnyModel
from r2r_glimp.routing.drift import DriftMonitor
from r2r_glimp.routing.policy import Route
from r2r_glimp.routing.routers import NAMED_ROUTERS, Router
from r2r_glimp.serve.errors import Refusal
from r2r_glimp.serve.protocol import Generation

Role = Literal["pair", "slm", "llm"]
_PER_REQUEST = (
    "granularity", "max_llm_share", "answer_by", "max_step_tokens", "max_thinking_tokens",
    "speculate",
)  # fmt: skip
# What a monitor compares by itself, or what changes no text.
_NOT_ROUTING: dict[str, Any] = dict.fromkeys(("router", "threshold", "granularity", "answer_by"))
_NOT_ROUTING |= {"speculate": 0}


class Catalog:
    """The models and routers of one server.

    Args:
        engine: whose router is the default.
        routing: what holds where a request says nothing.
        name: what the pair is called.
        trained: further trained routers, for the granularity each was made for.
    """

    def __init__(
        self,
        engine: Engine,
        routing: RoutingParams,
        *,
        name: str = "pair",
        trained: dict[Granularity, Router] | None = None,
    ) -> None:
        self.engine = engine
        self.routing = routing
        self.name = name
        self.created = int(time.time())
        self._roles: dict[str, Role] = {
            name: "pair", f"{name}:slm": "slm", f"{name}:llm": "llm",
        }  # fmt: skip
        # One object for each name: the engine scores rows of one router together.
        self._routers = {name: make() for name, make in NAMED_ROUTERS.items()}
        self._trained = dict(trained or {})
        default = engine.router
        if default.granularity is not None:
            self._trained[default.granularity] = default
        else:
            self._routers[default.name] = default
        self.monitors: dict[Router, DriftMonitor] = {
            router: DriftMonitor(router.traffic, f"{router.name}-{granularity}")
            for granularity, router in self._trained.items()
            if router.traffic is not None
        }

    @property
    def models(self) -> list[ModelCard]:
        return [self._card(name) for name in self._roles]

    @property
    def default(self) -> Route:
        """How a request is routed that says nothing."""
        return Route.resolve(self.routing, self.engine.router, shared=self.engine.shared)

    @property
    def is_watched(self) -> bool:
        """Whether such requests are held against a calibration."""
        return self.monitor(self.default) is not None

    @property
    def routers(self) -> list[str]:
        """Names a request may give."""
        return [*self._routers, *(["mlp"] if self._trained else [])]

    def card(self, name: str) -> ModelCard:
        """A model as `/v1/models` tells it.

        Raises:
            Refusal: 404, there is none of that name.
        """
        self.role(name)
        return self._card(name)

    def role(self, name: str | None) -> Role:
        """Who writes under a model's name; the pair where none is given.

        Raises:
            Refusal: 404, there is none of that name.
        """
        role = "pair" if name is None else self._roles.get(name)
        if role is None:
            known = ", ".join(self._roles)
            message = f"the model {name!r:.100} does not exist: choose one of {known}"
            raise Refusal(404, message, code="model_not_found", param="model")
        return role

    def loaded(self, name: str | None) -> AnyModel:
        """The model whose tokenizer a name stands for; the SLM's for the pair."""
        return self.engine.pair[Model(self.role(name) == "llm")]

    def route(self, body: Generation) -> tuple[RoutingParams, Route]:
        """The routing of a request, and the same with every default filled in.

        Raises:
            Refusal, UsageError: it names what is not there, or contradicts itself.
        """
        role = self.role(body.model)
        wanted = {name: getattr(body, name) for name in _PER_REQUEST}
        given: dict[str, Any] = {k: v for k, v in wanted.items() if v is not None}
        if role != "pair":
            for name in ("router", "threshold", "target_llm_share"):
                if getattr(body, name) is not None:
                    raise Refusal(
                        400, f"{name} has no meaning for the model {body.model}, which is one "
                        f"model alone: use {self.name}", param=name,
                    )  # fmt: skip
            given["router"] = self._routers[role]
            defaults = dataclasses.replace(self.routing, threshold=None)
        else:
            router = self._router(body.router, body.granularity or self.routing.granularity)
            defaults = self.routing
            if router is not self.engine.router:  # a threshold holds for its router alone
                defaults = dataclasses.replace(defaults, threshold=None)
            given["router"] = router
            threshold = self._threshold(body, router)
            if threshold is not None:
                given["threshold"] = threshold
        routing = dataclasses.replace(defaults, **given)
        router = cast(Router, routing.router)
        try:
            return routing, Route.resolve(
                routing, router, shared=self.engine.shared, apart=self.engine.pair.apart
            )
        except UsageError as error:
            raise Refusal(400, str(error).replace("--", ""), param="granularity") from None

    def monitor(self, route: Route) -> DriftMonitor | None:
        """Whose calibration a request is held against: none's where it was routed otherwise."""
        monitor = self.monitors.get(route.router)
        if monitor is None:
            return None
        known, own = monitor.traffic, dataclasses.replace(route.params, **_NOT_ROUTING)
        same = (route.threshold, route.answer_by) == (known.threshold, known.answer_by)
        usual = dataclasses.replace(self.routing, **_NOT_ROUTING)
        return monitor if same and own == usual else None

    def _threshold(self, body: Generation, router: Router) -> float | None:
        if router.constant is not None:
            for name in ("threshold", "target_llm_share"):
                if getattr(body, name) is not None:
                    raise Refusal(
                        400, f"{name} has no meaning for router {router.name}, which never decides",
                        param=name,
                    )  # fmt: skip
        if body.target_llm_share is None:
            return body.threshold
        try:
            return router.threshold_for_share(body.target_llm_share)
        except UsageError as error:
            raise Refusal(400, str(error), param="target_llm_share") from None

    def _router(self, name: str | None, granularity: Granularity | None) -> Router:
        default = self.engine.router
        if name is None:
            if default.granularity in (None, granularity) or granularity is None:
                return default
            return self._trained.get(granularity, default)
        if name == "mlp" and self._trained:
            if granularity in self._trained:
                return self._trained[granularity]
            return default if default.name == name else next(iter(self._trained.values()))
        if name not in self._routers:
            known = ", ".join(self.routers)
            raise Refusal(
                400, f"unknown router {name!r:.100}: choose one of {known}", param="router"
            )
        return self._routers[name]

    def _card(self, name: str) -> ModelCard:
        pair, role = self.engine.pair, self._roles[name]
        models = [Path(pair.slm.name).name, Path(pair.llm.name).name]  # no folders to strangers
        root = " + ".join(models) if role == "pair" else models[role == "llm"]
        card: dict[str, Any] = {
            "id": name,
            "created": self.created,
            "object": "model",
            "owned_by": "r2r_glimp",
            "root": root,
            "max_model_len": min(self.engine.room),
        }
        if role == "pair":
            route = self.default
            default: dict[str, Any] = {
                "router": route.router.name,
                "granularity": route.granularity,
            }
            if route.router.constant is None:
                default["threshold"] = route.threshold
            card |= {"routers": self.routers, "default_routing": default}
        return ModelCard.model_validate(card)

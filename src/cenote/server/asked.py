"""The models of a server by the names in requests, and the model of a request that names none."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

from cenote.errors import BadRequest, ConfigError, ModelNotFound

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from cenote.core import ModelInfo
    from cenote.pipeline.pipeline import Service

SCORES = {"cross-encoder": 0, "listwise": 0, "late-interaction": 1, "bi-encoder": 2}
"""How well models suit the rating of pairs, by the way in which they do it; one of a plugin's suits best."""


UNSUITED = 9
"""Rank of a model that does not offer the task of a route."""


def _rank_of_scores(info: ModelInfo) -> int:
    return SCORES.get(info.score_types[0], 0) if info.score_types else UNSUITED


def _rank_of_tasks(*tasks: str) -> Callable[[ModelInfo], int]:
    """Return the rank of a model whose default task is one of `tasks`, or that offers one of them."""

    def rank(info: ModelInfo) -> int:
        if info.default_task in tasks:
            return 0
        return UNSUITED if set(tasks).isdisjoint(info.tasks) else 1

    return rank


def _rank_of_classes(info: ModelInfo) -> int:
    """Return the rank of a classifier; one of a single label is most often a cross-encoder, and comes after others."""
    return _rank_of_tasks("classify")(info) + int(info.num_labels == 1)


def _rank_of_rewards(info: ModelInfo) -> int:
    return 0 if info.reward else UNSUITED


PURPOSES: dict[str, Callable[[ModelInfo], int]] = {
    "score": _rank_of_scores,
    "embed": _rank_of_tasks("embed"),
    "vectors": _rank_of_tasks("embed", "token_embed", "sparse"),
    "sparse": _rank_of_tasks("sparse"),
    "token_embed": _rank_of_tasks("token_embed"),
    "classify": _rank_of_classes,
    "token_classify": _rank_of_tasks("token_classify"),
    "reward": _rank_of_rewards,
}
"""How well a model suits the routes of a purpose: 0 = best."""


class Models:
    """The models of one server.

    Args:
        services: the models.
        any_name: the first model answers to names that none has.

    Raises:
        ConfigError: two have one name.

    Attributes:
        services: the models.
        views: the models, each followed by itself with each adapter that requests choose by name.
    """

    def __init__(self, services: list[Service], *, any_name: bool = False) -> None:
        self.services = services
        self.views = list(chain.from_iterable(service.views for service in services))
        self._any_name = any_name
        self._by_name = _by_name(self.views)

    @property
    def names(self) -> Iterable[str]:
        """The names that requests may use."""
        return self._by_name.keys()

    def find(self, model: str | None, *, any_name: bool = False) -> Service:
        """Return the model that a request names; the first one if it names none.

        Args:
            model: name in the request.
            any_name: a server of one model answers to every name.

        Raises:
            ModelNotFound: no model has that name.
        """
        if not model:
            return self.services[0]
        if model in self._by_name:
            return self._by_name[model]
        if any((self._any_name, any_name and len(self.services) == 1)):
            return self.services[0]
        raise ModelNotFound(f"The model `{model}` does not exist.")

    def adapted(self, model: str | None, adapter: str) -> str:
        """Return the name of an adapter that a request chooses beside the name of its model.

        Args:
            model: name in the request.
            adapter: name of an adapter of that model, or of any model if the request names none.

        Raises:
            BadRequest: the model has no such adapter.
            ModelNotFound: no model has that name.
        """
        names = {view.adapter for view in self.views if view.adapter and (not model or self._is_of(view, model))}
        if adapter not in names:
            listed = ", ".join(map(repr, sorted(names))) or "none"
            raise BadRequest(
                f"got the adapter {adapter!r} in `lora_path`; expected one that the server was started with "
                f"(--lora-modules): {listed}",
                param="lora_path",
            )
        return adapter

    def _is_of(self, view: Service, model: str) -> bool:
        """Return whether `view` is of the model with a name, or of the same adapter."""
        return view.engine is self.find(model).engine

    def made_for(self, purpose: str) -> str:
        """Return the name of the model that suits a purpose best, the first of several; else of the first model."""
        rank = PURPOSES[purpose]
        best = min(self.services, key=lambda service: rank(service.info))
        return best.names[0]


def _by_name(views: list[Service]) -> dict[str, Service]:
    """Return models, and models with adapters, by the names in requests.

    Raises:
        ConfigError: two have one name.
    """
    pairs = [(name, view) for view in views for name in view.names]
    by_name = dict(pairs)
    if len(by_name) < len(pairs):
        raise ConfigError(
            f"two models or adapters have one name: {', '.join(sorted(by_name))}; see --served-model-name"
        )
    return by_name

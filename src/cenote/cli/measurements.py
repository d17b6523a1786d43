"""Measurements of `cenote bench`: requests that are sent in rounds, and the figures of their answers."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy as np

from cenote.cli.load import Sample, closed, opened
from cenote.errors import CenoteError

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Seq

    import torch

    from cenote.cli.load import Ask
    from cenote.models.model import PoolingModel

    Figures = dict[str, Any]
    Source = Callable[[], list[str]]
    Products = Callable[[Callable[[], object]], "Gemm | None"]

WARM_UP = 8
"""Requests that each measurement sends beforehand."""

PERCENTILES = (50, 95, 99)

RATES = ("texts_per_second", "tokens_per_second")
"""Properties of a `Sample`, whose medians are figures."""


@dataclass
class Measurement:
    """One line of the table.

    Attributes:
        kind: throughput, latency, batches or load.
        value: tokens of a text, texts of a request, clients, or texts a second: the x axis of the plot.
        label: in the table.
        source: makes the texts of a sample.
        texts: number of texts of a sample.
        size: texts of a request.
        clients: that wait for their answers.
        samples: one for each round.
    """

    kind: str
    value: float
    label: str
    source: Source
    texts: int
    size: int = 1
    clients: int = 1
    samples: list[Sample] = field(default_factory=list)

    @property
    def warm_up_texts(self) -> int:
        """Texts that are run beforehand."""
        return min(self.texts, WARM_UP * self.size)

    def requests(self) -> list[list[str]]:
        """Return the requests of a sample."""
        texts = self.source()
        return [texts[i : i + self.size] for i in range(0, len(texts), self.size)]

    def warm_up(self, ask: Ask, tell: Callable[[int], object]) -> None:
        """Send some requests.

        Raises:
            CenoteError: none of them is answered.
        """
        sample = closed(ask, self.requests()[:WARM_UP], clients=min(self.clients, WARM_UP), progress=tell)
        if sample.errors and not sample.texts:
            raise CenoteError(f"{self.label}: no request was answered: {sample.errors[0]}")

    def run(self, ask: Ask, tell: Callable[[int], object]) -> None:
        """Add a sample."""
        self.samples.append(closed(ask, self.requests(), clients=self.clients, progress=tell))

    def figures(self) -> Figures:
        """Return the entry of the JSON file. Rates and percentiles are `None` without an answer."""
        samples = self.samples
        total = Sample.of(samples)
        latencies, errors = total.latencies, total.errors
        figures = {
            "kind": self.kind,
            "value": self.value,
            "label": self.label,
            "requests": len(latencies) + len(errors),
            "errors": len(errors),
            "texts": total.texts,
            "tokens": total.tokens,
            **_rates(samples),
            **_percentiles(latencies),
            "seconds": [sample.seconds for sample in samples],
        }
        if errors:
            figures["first_error"] = errors[0]
        return figures

    def beside(self) -> Figures:
        """Return entries of the JSON file beside the measurements."""
        return {}


@dataclass
class Arrivals(Measurement):
    """Texts that arrive whether or not earlier ones are answered, with at most `clients` requests under way.

    Attributes:
        rate: texts a second.
    """

    rate: float = 0.0

    def run(self, ask: Ask, tell: Callable[[int], object]) -> None:
        """Add a sample."""
        seed = len(self.samples)
        sample = opened(ask, self.requests(), rate=self.rate, most=self.clients, seed=seed, progress=tell)
        self.samples.append(sample)


@dataclass
class Throughput(Measurement):
    """All texts in one request, and the time that the matrix products alone take.

    Attributes:
        products: counts the matrix products of some work, and runs it; see `products_of`.
        gemm: the products; `None` = they are not known.
        limits: seconds that they take, one for each round.
    """

    products: Products = field(kw_only=True)
    gemm: Gemm | None = None
    limits: list[float] = field(default_factory=list)

    def warm_up(self, ask: Ask, tell: Callable[[int], object]) -> None:
        """Send the request, and count its matrix products."""
        self.gemm = self.products(partial(ask, self.source()))
        tell(self.texts)

    def run(self, ask: Ask, tell: Callable[[int], object]) -> None:
        """Add a sample and a limit."""
        if self.gemm:
            self.limits.append(self.gemm.seconds())
        super().run(ask, tell)

    def figures(self) -> Figures:
        """Return the entry of the JSON file, in which percentiles are `None`."""
        figures = super().figures() | _percentiles([])
        if self.limits:
            shares = [limit / sample.seconds for limit, sample in zip(self.limits, self.samples, strict=True)]
            figures |= {"gemm_seconds": self.limits, "share_of_gemm_limit": statistics.median(shares)}
        return figures

    def beside(self) -> Figures:
        """Return the matrix products."""
        return {"gemm": self.gemm.figures()} if self.gemm else {}


def _rates(samples: Seq[Sample]) -> Figures:
    if not Sample.of(samples).latencies:
        return dict.fromkeys(RATES)
    return {name: statistics.median(map(attrgetter(name), samples)) for name in RATES}


def _percentiles(latencies: Seq[float]) -> Figures:
    names = [f"p{part}_ms" for part in PERCENTILES]
    if not latencies:
        return dict.fromkeys(names)
    milliseconds = 1000 * np.percentile(latencies, PERCENTILES)
    return dict(zip(names, milliseconds.tolist(), strict=True))


class Gemm:
    """The matrix products of a workload.

    Args:
        model: on a CPU.
        batch: tokens of its largest batches.
        work: runs the workload.
    """

    def __init__(self, model: PoolingModel, batch: int, work: Callable[[], object]) -> None:
        import torch

        from cenote.models import costs

        self._costs = costs
        self._dtype: torch.dtype = getattr(torch, model.info.report.dtype)
        self.products = costs.products(model.layout.backbone.model, work)
        self.rows = min(batch, max(self.products.values(), default=1))

    def seconds(self) -> float:
        """Return the seconds that they take now."""
        return self._costs.seconds(self.products, rows=self.rows, dtype=self._dtype)

    def figures(self) -> Figures:
        """Return their entry of the JSON file."""
        shapes = [{"out": out, "in": into, "rows": n} for (out, into), n in self.products.items()]
        dtype = str(self._dtype).removeprefix("torch.")
        return {"flop": self._costs.flop(self.products), "dtype": dtype, "rows": self.rows, "products": shapes}


def products_of(model: PoolingModel | None, batch: int, work: Callable[[], object]) -> Gemm | None:
    """Run a workload, and count its matrix products if the model is here and on a CPU."""
    if model is None or model.info.report.device != "cpu":
        work()
        return None
    gemm = Gemm(model, batch, work)
    return gemm if gemm.products else None

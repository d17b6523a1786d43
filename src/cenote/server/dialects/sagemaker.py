"""SageMaker's dialect: `/invocations`, whose body is that of any route of this server."""

from __future__ import annotations

from cenote.server.dialects import openai, scoring, tei
from cenote.server.routes import Dialect, Route

DIALECT = Dialect(
    "SageMaker",
    (
        Route("/invocations", tei.root, tei.RootRequest),
        Route(
            "/invocations",
            tei.rerank,
            tei.TeiRerankRequest,
            is_described=False,
            marks=frozenset({"texts"}),
            purpose="score",
        ),
        Route(
            "/invocations",
            scoring.score,
            scoring.ScoreRequest,
            is_described=False,
            either=frozenset({"queries", "data_1", "text_1"}),
            purpose="score",
        ),
        Route(
            "/invocations",
            scoring.rerank,
            scoring.RerankRequest,
            is_described=False,
            marks=frozenset({"documents"}),
            purpose="score",
        ),
        Route(
            "/invocations",
            openai.embeddings,
            openai.EmbeddingRequest,
            is_described=False,
            either=frozenset({"input", "messages"}),
            purpose="vectors",
        ),
    ),
    prefix="sagemaker",
)

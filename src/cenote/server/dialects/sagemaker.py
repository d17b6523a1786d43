"""SageMaker's dialect: `/invocations`, whose body is that of any route of this server.

A container has that path. Clients, boto3's `sagemaker-runtime`, send to that of an endpoint, which SageMaker passes on.
"""

from __future__ import annotations

from cenote.server.dialects import openai, scoring, tei
from cenote.server.routes import Dialect, Route

ENDPOINT = ("/endpoints/{model}/invocations",)
"""The path that boto3 sends to, where the name of an endpoint is that of a model."""
DIALECT = Dialect(
    "SageMaker",
    (
        Route("/invocations", tei.root, tei.RootRequest, aliases=ENDPOINT),
        Route(
            "/invocations",
            tei.rerank,
            tei.TeiRerankRequest,
            aliases=ENDPOINT,
            is_described=False,
            marks=frozenset({"texts"}),
            purpose="score",
        ),
        Route(
            "/invocations",
            scoring.score,
            scoring.ScoreRequest,
            aliases=ENDPOINT,
            is_described=False,
            either=frozenset({"queries", "data_1", "text_1"}),
            purpose="score",
        ),
        Route(
            "/invocations",
            scoring.rerank,
            scoring.RerankRequest,
            aliases=ENDPOINT,
            is_described=False,
            either=frozenset({"documents", "query"}),
            purpose="score",
        ),
        Route(
            "/invocations",
            openai.embeddings,
            openai.EmbeddingRequest,
            aliases=ENDPOINT,
            is_described=False,
            either=frozenset({"input", "messages"}),
            purpose="vectors",
        ),
    ),
    prefix="sagemaker",
)

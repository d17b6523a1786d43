"""boto3: `sagemaker-runtime`, whose endpoints are the models of a server."""

from __future__ import annotations

import json

import boto3
from botocore.config import Config

from clients.call import VALUES, A, Call
from clients.refusals import refusals

V = VALUES
ONCE = Config(retries={"total_max_attempts": 1})
UNNAMED = {"region_name": "us-east-1", "aws_access_key_id": "none", "aws_secret_access_key": "none", "config": ONCE}


def invoke(url: str, key: str = "none", model: str = "minilm", **body: object) -> object:
    """Send a body; the key of a signature is none of the server's."""
    client = boto3.client("sagemaker-runtime", endpoint_url=url, **UNNAMED)
    answer = client.invoke_endpoint(EndpointName=model, ContentType="application/json", Body=json.dumps(body))
    return json.loads(answer["Body"].read())


def embed(url: str, key: str = "none", **fields: object) -> object:
    return invoke(url, key, **{"input": V["texts"], **fields})


def rank(url: str, key: str = "none", **fields: object) -> object:
    named = {"model": "cross"} if url == A else {}
    return invoke(url, key, **{"query": V["question"], "documents": V["texts"], "truncate": False, **named, **fields})


def run(url: str, key: str = "none", **fields: object) -> object:
    return invoke(url, key, **{"inputs": V["texts"], "truncate": False, **fields})


CALLS = []
ERRORS = [
    Call("invoke_endpoint: input", lambda: embed(A), "data.*.embedding", V["vectors"]),
    Call("invoke_endpoint: documents", lambda: rank(A), "results.*.index,relevance_score", V["ranked"]),
    Call("invoke_endpoint: inputs", lambda: run(A), "", V["vectors"]),
    *refusals(embed, "input", "ClientError", of="input"),
    *refusals(rank, "documents", "ClientError", of="documents", long=[V["long"]]),
    *refusals(run, "inputs", "ClientError", of="inputs"),
]

"""google-cloud-aiplatform: a `PrivateEndpoint` of Vertex AI, which asks the container itself."""

from __future__ import annotations

from google.auth.credentials import AnonymousCredentials
from google.cloud.aiplatform import PrivateEndpoint
from google.cloud.aiplatform.compat.types import endpoint as endpoints

from clients.call import VALUES, A, Call
from clients.refusals import LONG, refusals

V = VALUES
HOME = {"project": "none", "location": "us-central1"}


def endpoint(url: str) -> PrivateEndpoint:
    """Return the endpoint of a container; Google's service, which would tell of it, is not asked."""
    places = {"predict_http_uri": f"{url}/vertex", "health_http_uri": f"{url}/health"}
    resource = endpoints.Endpoint(
        name="projects/none/locations/us-central1/endpoints/1",
        network="projects/1/global/networks/none",
        create_time={"seconds": 1},
        deployed_models=[{"id": "1", "private_endpoints": places}],
    )
    return PrivateEndpoint._construct_sdk_resource_from_gapic(resource, credentials=AnonymousCredentials(), **HOME)


def predict(url: str, key: str = "", model: str = "", instances: object = None) -> object:
    """Send instances. The client brings no key; a model is named by the parameters of all instances."""
    parameters = {"truncate": False, **({"model": model} if model else {})}
    return endpoint(url).predict(instances=instances, parameters=parameters)


def right(url: str, key: str = "", **fields: object) -> object:
    return predict(url, key, **{"instances": [{"inputs": text} for text in V["texts"]], **fields})


CALLS = []
ERRORS = [
    Call("PrivateEndpoint.predict", lambda: right(A), "predictions.*.0", V["vectors"]),
    Call("PrivateEndpoint.health_check", lambda: endpoint(A).health_check(), "", True),
    *refusals(
        right,
        "instances",
        "RuntimeError",
        type=[{"inputs": 1.5}],
        long=[{"inputs": LONG}],
        large=[{"inputs": "a" * 2500}],
    ),
]

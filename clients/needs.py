"""What clients need beyond the request that a vendor documents first."""

from __future__ import annotations

NEEDS = {
    "vendors-input-types": "a vendor's input types, where the model has no prompts",
    "any-model-name": "a name of a model that is not served",
    "hub-and-tei": "routes of Text Embeddings Inference and the hub",
    "null-fields": "a field that is null for one that is not given",
    "long-documents": "documents longer than the model reads, or limits above its own",
    "answers-of-several-vendors": "an answer with the keys that the client of each vendor reads",
    "dimensions-of-the-model": "`dimensions` that are the model's own, or 0",
    "vendors-paths": "paths of a vendor's own",
    "headers-of-keys": "keys in other headers than `Authorization`",
    "no-content-type": "JSON without a `Content-Type`",
    "token-ids-of-another-tokenizer": "token ids of another tokenizer",
    "readable-errors": "errors in the form that the client reads",
    "pages-in-browsers": "a browser's question before a request",
    "url-per-model": "a URL for each model, of clients that send no name",
    "objects-for-texts": "objects with a text for texts",
    "late-chunking": "chunks that are embedded in the light of the whole text",
    "no-model-name": "requests that name no model, to a server of several",
}
"""By the name that a `Call.cause` has."""

"""Small forms of dense vectors: those of a request, and the ranges of int8 and uint8."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from cenote.errors import BadRequest
from cenote.server.wire import sizes
from cenote.server.wire.encoding import VECTOR_TYPES, VectorType, typed, typed_values
from cenote.server.wire.fields import Many, PoolingFields
from cenote.tasks import KINDS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cenote.core import PoolingParams
    from cenote.pipeline.pipeline import Service
    from cenote.server.wire.fields import Form
    from cenote.tensors.quantize import Ranges

SPELLINGS = ("embedding_type", "encoding_type", "output_dtype", "embedding_types")
"""Names of the field that asks for types: Jina's, LlamaIndex's for Jina, Voyage's and Cohere's."""
ENCODINGS: tuple[tuple[VectorType, ...], ...] = (("float",), ("base64",))
"""Types that are not small forms, but other names of an `encoding_format`."""


class TypedFields(PoolingFields):
    """A request for dense vectors in small forms, under the names that clients of other services use.

    One type makes each vector that form, several an object by type. `base64` alone is an `encoding_format`.
    """

    embedding_type: VectorType | Many[VectorType] | None = Field(
        None, description="float, int8, uint8, binary, ubinary, base64, or several of them (Jina)"
    )
    encoding_type: VectorType | Many[VectorType] | None = Field(None, description="as `embedding_type` (LlamaIndex)")
    output_dtype: VectorType | None = Field(None, description="as `embedding_type` (Voyage)")
    embedding_types: Many[str] | None = Field(
        None, description="as `embedding_type` (Cohere); and dense, sparse, colbert: several kinds from one forward"
    )

    @model_validator(mode="after")
    def _types(self) -> TypedFields:
        fields = self._type_fields
        if not fields:
            return self
        field = fields[0]
        if len(fields) > 1:
            names = " and ".join(f"`{name}`" for name in fields)
            raise PydanticCustomError("types", f"Only one of {names} can be given.", {"param": field})
        self._check_known()
        if self._forms() == ("base64",) and self.encoding_format == "float":
            self.encoding_format = "base64"
        if self.vector_types() and not self._encodes_forms():
            raise PydanticCustomError(
                "types",
                f"`{field}` has the encoding_format 'float' (numbers) or 'base64' (their bytes), without "
                "`embed_dtype` or `endianness`.",
                {"param": field},
            )
        return self

    def _check_known(self) -> None:
        types = (*VECTOR_TYPES, *KINDS)
        unknown = set(self.embedding_types or ()).difference(types)
        if unknown:
            raise PydanticCustomError(
                "types",
                f"Unknown embedding type {min(unknown)!r}; known are: {', '.join(types)}.",
                {"param": "embedding_types"},
            )

    def _encodes_forms(self) -> bool:
        """Return whether small forms have the encoding of the request."""
        encoding = (self.encoding_format, self.embed_dtype, self.endianness)
        return self.encoding_format == "float" or encoding == ("base64", "float32", "native")

    @property
    def number_bytes(self) -> float:
        """See `PoolingFields.number_bytes`."""
        types = self.vector_types()
        return sum(map(sizes.FORMS.__getitem__, types)) if types else super().number_bytes

    def vector_types(self) -> tuple[VectorType, ...]:
        """Return the small forms of the request, each once; none if `encoding_format` alone is the form."""
        if not self._type_fields:
            return ()
        forms = self._forms()
        return () if forms in ENCODINGS else forms

    def form(self, service: Service, tasks: Iterable[str], params: PoolingParams) -> Form | None:
        """See `PoolingFields.form`.

        Raises:
            BadRequest: a form cannot be made of these vectors, or the request has no dense vector.
        """
        types = self.vector_types()
        if not types:
            return None
        field = self._type_fields[0]
        if "embed" not in tasks:
            raise BadRequest(
                f"`{field}` is for dense embeddings (task 'embed'), and the task is {' and '.join(map(repr, tasks))}",
                param=field,
            )
        ranges = ranges_for(service, types, params, field)
        as_base64 = self.encoding_format == "base64"
        return lambda vectors: typed_values(vectors, types, ranges, as_base64=as_base64)

    @cached_property
    def _type_fields(self) -> list[str]:
        """Names of the fields that ask for types."""
        return [name for name in SPELLINGS if getattr(self, name)]

    def _forms(self) -> tuple[VectorType, ...]:
        """Return the types of the request, each once, without kinds of embeddings."""
        names: list[Any] = []
        for field in self._type_fields:
            value = getattr(self, field)
            names += [value] if isinstance(value, str) else value
        return tuple(dict.fromkeys(filter(VECTOR_TYPES.__contains__, names)))


def ranges_for(
    service: Service, types: Iterable[VectorType], params: PoolingParams, param: str | None
) -> Ranges | None:
    """Return the ranges of int8 and uint8 vectors of a request; `None` = the fixed one, or not needed.

    Calibrated ranges are for vectors of one length with the model's activation. A vector that is shortened and then
    normalised has other values in the dimensions that it keeps, so their ranges do not fit it. The fixed range fits
    vectors of length 1 only.

    Raises:
        BadRequest: a form cannot be made of these vectors. Nothing was computed for it.
    """
    types = tuple(types)
    ranges = _ranges(service, params, param) if {"int8", "uint8"} & {*types} else None
    dimension = params.dimensions or (ranges.dimension if ranges else service.info.dimension)
    typed([np.zeros(dimension, np.float32)], types, ranges, param=param)
    return ranges


def _ranges(service: Service, params: PoolingParams, param: str | None) -> Ranges | None:
    """Return the ranges of `service`, once they are known to fit the vectors of a request."""
    if service.ranges is not None:
        _check_calibrated(service.ranges, service, params)
    elif not params.activates(service.info.use_activation):
        raise BadRequest(
            "int8 and uint8 embeddings need a fixed range, and vectors that are not normalised have none: "
            "set use_activation, or start the server with --calibration",
            param=param,
        )
    return service.ranges


def _check_calibrated(ranges: Ranges, service: Service, params: PoolingParams) -> None:
    is_normalised = service.info.use_activation
    if params.activates(is_normalised) != is_normalised:
        raise BadRequest(
            "int8 and uint8 embeddings are calibrated for this model's own use_activation "
            f"({str(is_normalised).lower()}), so it cannot be changed",
            param="use_activation",
        )
    if params.dimensions not in (None, 0, ranges.dimension):
        raise BadRequest(
            f"int8 and uint8 embeddings are calibrated for {ranges.dimension} dimensions on this server, so they "
            f"cannot be shortened to {params.dimensions}; ask for float, binary or ubinary",
            param="dimensions",
        )

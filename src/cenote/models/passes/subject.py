"""The subject of passes: a model in its proved layout."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from cenote.models.audit import Audit
from cenote.models.passes.patches import Patches
from cenote.tensors.linear import FORMS, PATHS

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from transformers import PreTrainedModel

    from cenote.models.layouts import Layout
    from cenote.models.lora import Adapter
    from cenote.models.passes.shelf import Shelf
    from cenote.models.probe import Probe
    from cenote.tensors.chains import Products
    from cenote.tensors.linear import Kernel
    from cenote.tensors.native import Kernels


@dataclass(frozen=True)
class Narrowing:
    """The way in which weights are narrowed.

    Attributes:
        kernel: runs narrow weights; `None` = everything stays in float32.
        path: the kernel's, of `cenote.tensors.linear.PATHS`.
        dtype: of the token embedding, and of Linears unless they are quantised; `None` = float32.
        fault: why everything stays in float32 in spite of the options.
    """

    kernel: Kernel | None = None
    path: str = ""
    dtype: torch.dtype | None = None
    fault: str = ""

    @property
    def makes_steps(self) -> bool:
        """See `cenote.tensors.linear.Form`."""
        return self.kernel is not None and FORMS[PATHS[self.path].kind].makes_steps


@dataclass(frozen=True)
class Settings:
    """Settings of the passes.

    Attributes:
        max_length: maximum tokens of a sequence.
        kernels: native CPU kernels, if there are any.
        products: multiplies by packed matrices on a CPU, if anything does.
        fused: kinds of changes that fusing tries, of `cenote.models.passes.fuse.KINDS`; `None` = all.
        graph_tokens: tokens up to which forwards are replayed; 0 = none are.
        adapters: those that sequences may choose, by name.
        reserves_adapters: more of them may be added to the loaded model.
        audit: gets their tensors.
        narrowing: how weights are narrowed, if they are.
        invariant: rows may not depend by a bit on the rest of the batch, or on the number of threads.
    """

    max_length: int = 1 << 30
    kernels: Kernels | None = None
    products: Products[Any] | None = None
    fused: tuple[str, ...] | None = None
    graph_tokens: int = 0
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    reserves_adapters: bool = False
    audit: Audit = field(default_factory=Audit)
    narrowing: Narrowing = field(default_factory=Narrowing)
    invariant: bool = False

    @property
    def keeps_bits(self) -> bool:
        """Whether nothing that depends on the rest of a batch may change by a bit the way in which a row is computed.

        Products in 8 bits, for instance, make whole steps out of the rounding of their inputs.
        """
        return self.invariant or self.narrowing.makes_steps


class Outcome(NamedTuple):
    """A line for the report at start, and warnings; empty if there is nothing to say."""

    text: str = ""
    notes: tuple[str, ...] = ()


@dataclass(eq=False)
class Subject:
    """A model and its layout, which passes change.

    Attributes:
        full: the model with its head, if it has one.
        layout: of its backbone.
        reasons: why faster layouts were passed over.
        probe: by which the layout was proved.
        pictures: the probe with pictures; `None` = the model takes none.
        patches: the record of changes.
        shelf: the adapters that are hooked in, if there are any.
        outcomes: by the name of the pass.
    """

    full: PreTrainedModel
    layout: Layout
    reasons: list[str]
    probe: Probe
    settings: Settings = field(default_factory=Settings)
    pictures: Probe | None = None
    patches: Patches = field(default_factory=Patches)
    shelf: Shelf | None = None
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    @property
    def backbone(self) -> PreTrainedModel:
        """The model without its head."""
        return self.layout.backbone.model

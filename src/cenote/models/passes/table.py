"""The passes in the order in which they are applied, and a model that is taken through them.

Each pass changes a model in its proved layout, proves by `cenote.models.probe` that the model still has the results
that it must have, and takes back any change that it cannot prove. Each can be left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cenote.models.passes import adapters, company, fuse, graphs, last_layer, narrow, prefixes
from cenote.models.passes.subject import Outcome, Settings, Subject
from cenote.models.probe import choose

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Pass:
    """A change of a loaded model.

    Attributes:
        name: key of its outcome.
        only_faster: whether it changes no answer but for rounding, so that `--plain` leaves it out.
        apply: changes the subject, proves it, and returns lines for the report at start.
        undo: takes everything back; `None` if that cannot be done. Passes are taken back in reverse order.
    """

    name: str
    only_faster: bool
    apply: Callable[[Subject], Outcome]
    undo: Callable[[Subject], None] | None


PASSES = (
    Pass("adapters", False, adapters.apply, adapters.undo),
    Pass("prefixes", True, prefixes.apply, prefixes.undo),
    Pass("fuse", True, fuse.apply, fuse.undo),
    Pass("last_layer", True, last_layer.apply, last_layer.undo),
    Pass("graphs", True, graphs.apply, graphs.undo),
    Pass("narrow", False, narrow.apply, None),
    Pass("company", False, company.apply, company.undo),
)
ONLY_FASTER = frozenset(row.name for row in PASSES if row.only_faster)
"""Names of the passes that `--plain` leaves out."""


def prepare(subject: Subject, leave_out: Collection[str] = ()) -> None:
    """Take `subject` through the passes, but for those whose names are in `leave_out`."""
    for row in PASSES:
        if row.name not in leave_out:
            subject.outcomes[row.name] = row.apply(subject)


def prepared(
    model: PreTrainedModel,
    settings: Settings | None = None,
    *,
    packed: bool = True,
    filled_to: int = 0,
    leave_out: Collection[str] = (),
) -> Subject:
    """Prove a layout for a backbone, and take it through the passes.

    Args:
        model: in eval mode, on its device, with the attention implementation that it prefers.
        settings: of the passes.
        packed: see `choose`.
        filled_to: see `choose`.
        leave_out: names of passes.

    Raises:
        CheckpointError: see `choose`; or an adapter or narrow weights cannot be honoured.
    """
    settings = settings or Settings()
    proved = choose(model, max_length=settings.max_length, packed=packed, kernels=settings.kernels, filled_to=filled_to)
    subject = Subject(model, proved.layout, proved.reasons, proved.probe, settings)
    prepare(subject, leave_out)
    return subject

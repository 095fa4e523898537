"""Whether a new revision of an adapter answers the same question as the one it replaces.

A client that has learnt an adapter's labels goes on using them. So a replacement with others must
be meant, not happen by a wrong file name.
"""

from collections.abc import Sequence

from adapters.difference import label_changes
from adapters.errors import listing
from adapters.format.spec import AdapterSpec

_SHOWN = 10


def changed_meaning(before: AdapterSpec, after: AdapterSpec) -> list[str]:
    """What clients would notice beside better or worse scores, in words; empty if nothing."""
    changes = []
    if after.activation != before.activation:
        changes.append(f"activation {before.activation} -> {after.activation}")
    labels = label_changes(before, after)
    if labels.added:
        changes.append(f"labels added: {_shown(labels.added)}")
    if labels.removed:
        changes.append(f"labels removed: {_shown(labels.removed)}")
    if labels.reordered and not (labels.added or labels.removed):
        changes.append(f"labels in another order: {_shown(after.labels)}")
    # The data's name alone is no reason: it changes with every new file of rows.
    if changes and before.provenance.data != after.provenance.data:
        changes.append(
            f"trained on {after.provenance.data or 'unknown data'}, "
            f"the current one on {before.provenance.data or 'unknown data'}"
        )
    return changes


def _shown(labels: Sequence[str]) -> str:
    return listing(labels, _SHOWN)

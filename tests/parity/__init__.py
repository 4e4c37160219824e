"""One table of features, a row each, that tests/test_parity.py runs with LoRA and with WaRA, and the docs show.

A row is a function with `@row` above it, in the file of its area: what users name the feature, what comes of it with
LoRA and with WaRA, and what to do instead. A feature whose test is elsewhere is a `shown_in`. After a change
`python -m docs.compatibility` writes the page.
"""

from . import adapters, config, experts, merging, saving, targets, tools, training
from .table import Area

AREAS: tuple[Area, ...] = (
    config.AREA,
    targets.AREA,
    experts.AREA,
    training.AREA,
    saving.AREA,
    merging.AREA,
    adapters.AREA,
    tools.AREA,
)

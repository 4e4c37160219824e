"""Forms of WaRA. Each is one class that says how an adapter's parts are made, saved and combined, and what they do."""

from .base import Form, Parts, Settings, Target
from .experts import ExpertsFactor
from .factor_cache import factors_of_one_call
from .factors import SubbandFactor, TiedFactor, frozen_factors
from .grid import GridForm
from .observed_grids import stop_observing
from .shared import SharedForm
from .subband import SubbandForm
from .tiny import TinyForm

SUBBAND = SubbandForm()
FORMS: dict[str, Form] = {form.name: form for form in (SUBBAND, SharedForm(), GridForm(), TinyForm())}
"""Every form by the name that `WaRAConfig.form` gives."""

__all__ = [
    "FORMS",
    "SUBBAND",
    "ExpertsFactor",
    "Form",
    "Parts",
    "Settings",
    "SubbandFactor",
    "Target",
    "TiedFactor",
    "factors_of_one_call",
    "frozen_factors",
    "stop_observing",
]

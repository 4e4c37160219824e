"""Orthogonal wavelets with periodised boundaries: filters, the layout of axes and subbands, 1-D transforms of rows.

Axis length d, synthesis filters (lo, hi) from PyWavelets, d_0 = d and d_j = ceil(d_{j-1} / 2). Lo_j and Hi_j, both of
shape (d_{j-1}, d_j), upsample by two, filter circularly and trim to d_{j-1}. Then

    S_{j,a} = Lo_1 ... Lo_{j-1} Lo_j,        S_{j,d} = Lo_1 ... Lo_{j-1} Hi_j,        S_0 = I.

Every signal handled here lies in one band: a row of level j is multiplied by S_{j,a} or S_{j,d}, whichever its `Axis`
says. That is what low-rank factors of subbands need, and all rows of a level then share one pass. Nothing here knows
of modules or of PEFT.

Source of the boundary handling: PyWavelets, mode "periodization".
"""

from .constant_tensors import Constants, constant_tensors
from .filters import Filters, filters, max_useful_level
from .layout import Axis, Subband, axis_sizes, subbands
from .modes import autocast_off, is_autocast_on
from .transforms import adjoint, into_band, synthesis, synthesis_at, synthesis_into

__all__ = [
    "Axis",
    "Constants",
    "Filters",
    "Subband",
    "adjoint",
    "autocast_off",
    "axis_sizes",
    "constant_tensors",
    "filters",
    "into_band",
    "is_autocast_on",
    "max_useful_level",
    "subbands",
    "synthesis",
    "synthesis_at",
    "synthesis_into",
]

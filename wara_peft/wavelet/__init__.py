"""Orthogonal wavelets with periodised boundaries: filters, the layout of axes and subbands, 1-D transforms of rows.

An axis of length d has d_0 = d samples at level 0 and d_j = ceil(d_{j-1} / 2) at level j. PyWavelets gives the
synthesis filters (lo, hi). The matrices Lo_j and Hi_j, both of shape (d_{j-1}, d_j), upsample by two, filter
circularly with lo or hi, and trim to d_{j-1}. The synthesis matrices of level j,
for its approximation (a) and its detail (d), are

    S_{j,a} = Lo_1 ... Lo_{j-1} Lo_j,        S_{j,d} = Lo_1 ... Lo_{j-1} Hi_j,        S_0 = I.

Every row that is transformed here lies in one band: its `Axis` says whether a row of level j is multiplied by S_{j,a}
or by S_{j,d}. Low-rank factors of subbands need no more, and all rows of a level share one pass. Nothing in this
folder knows modules or PEFT.

Source of the boundary handling: PyWavelets, mode "periodization".
"""

from .constant_tensors import Constants, constant_tensors
from .filters import Filters, filters, max_useful_level
from .layout import Axis, Subband, axis_sizes, subbands
from .least_squares import least_squares
from .modes import autocast_off, is_autocast_on, is_transformed
from .transforms import adjoint, into_band, synthesis, synthesis_at

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
    "is_transformed",
    "least_squares",
    "max_useful_level",
    "subbands",
    "synthesis",
    "synthesis_at",
]

"""Ranks by module and subband for a budget of parameters, found before training, or while it goes on (`schedule`)."""

from .allocate import Allocation, allocate_ranks
from .report import AllocationReport, ModuleAllocation

__all__ = ["Allocation", "AllocationReport", "ModuleAllocation", "allocate_ranks"]

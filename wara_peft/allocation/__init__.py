"""Ranks by module and subband for a budget of parameters, found before training or while it goes on."""

from .allocate import Allocation, allocate_ranks
from .report import AllocationReport, ModuleAllocation
from .schedule import RankSchedule

__all__ = ["Allocation", "AllocationReport", "ModuleAllocation", "RankSchedule", "allocate_ranks"]

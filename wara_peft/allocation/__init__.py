"""Distributes a budget of parameters as ranks over modules and subbands.

`allocate_ranks` does so before training, `schedule.RankSchedule` during training.
"""

from .allocate import Allocation, allocate_ranks
from .report import AllocationReport, ModuleAllocation

__all__ = ["Allocation", "AllocationReport", "ModuleAllocation", "allocate_ranks"]

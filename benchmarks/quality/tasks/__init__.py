"""The tasks, one file a family."""

from quality.tasks import digits, planted
from quality.tasks.task import Task

TASKS: dict[str, Task] = {task.name: task for family in (digits, planted) for task in family.TASKS}

__all__ = ["TASKS", "Task"]

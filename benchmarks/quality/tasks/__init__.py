"""The tasks, one file a family."""

from quality.tasks import conv, digits, docstrings, language, planted
from quality.tasks.task import Task

FAMILIES = (digits, docstrings, language, conv, planted)
TASKS: dict[str, Task] = {task.name: task for family in FAMILIES for task in family.TASKS}

__all__ = ["FAMILIES", "TASKS", "Task"]

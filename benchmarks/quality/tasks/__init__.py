"""The tasks, one file a family."""

from quality.tasks import conv, digits, docstrings, language, planted
from quality.tasks.task import Task

# The quick ones first, as that is the order in which a stage takes them.
FAMILIES = (planted, conv, digits, language, docstrings)
TASKS: dict[str, Task] = {task.name: task for family in FAMILIES for task in family.TASKS}

__all__ = ["FAMILIES", "TASKS", "Task"]

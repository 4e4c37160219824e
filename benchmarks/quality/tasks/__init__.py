"""The tasks, one file a family."""

from quality.tasks import conv, digits, docstrings, language, planted, translation
from quality.tasks.task import Task

# The quick ones first, as that is the order in which a stage takes them.
_ALL = (planted.TASKS, conv.TASKS, digits.TASKS, language.TASKS, docstrings.TASKS, digits.LONG, translation.TASKS)
TASKS: dict[str, Task] = {task.name: task for of_family in _ALL for task in of_family}

__all__ = ["TASKS", "Task"]

"""Methods for classes and tasks that arrive one after the other, without stored data."""

from .._common.features import Body
from .._common.tasks import ClassTask, TaskParameters, class_tasks

__all__ = ["Body", "ClassTask", "TaskParameters", "class_tasks"]

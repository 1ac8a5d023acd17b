"""Methods for classes and tasks that arrive one after the other, without stored data."""

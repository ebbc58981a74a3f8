"""Starting a job: the driver, torchrun, the worker processes, and resolving, measuring and opening a run before that."""

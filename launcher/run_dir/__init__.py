"""The run directory: its files, its lock, and the rules for resuming in it.

`open_run.open_run` chooses the directory and decides whether to resume, before anything is created. `RunDirectory` has
the paths and small files, `RunDirLock` the lock, `read_run_metrics` the rows of one run, and `failures` the records
that failing ranks leave for the driver.
"""

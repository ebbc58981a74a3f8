"""The `tune` command: measure per-device batch sizes with the real training step and recommend one.

`driver.tune_batch_size` starts the measuring processes (`processes`) and prints the result (`report`);
`tune_sweep.tune_sweep` does so for each point of a sweep. In a measuring process `session.measure_on_rank` searches the
sizes (`search_loop.SizeSearch`), each measured by `probe.measure_size`; `cache` keeps the results for
`batch.per_device=auto`, which `launch.resolve_auto` replaces by a measured size when a job starts.
"""

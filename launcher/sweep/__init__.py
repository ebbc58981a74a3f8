"""Sweeps (`launcher -m`): several runs that differ in some keys, and the table of their results.

`run_sweep.run_sweep` runs them in one of three ways: one after the other through Hydra (`points`), in parallel on
slices of this machine (`parallel_points`, `machine_slices`), or as chosen by Optuna (`optuna_search`). `outcome` says
how each point ended. `results_table.format_sweep_table` shows the times and metrics of the points, the
best ones, and the critical batch size that `critical_batch` fits.
"""

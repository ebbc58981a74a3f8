"""Starting a job: resolve the configuration, measure what is open, open the run directory, start the workers.

`driver.launch_job` does this on one machine and runs torchrun there (`torchrun_agent`); `worker.main` is what each rank
runs under the user's own torchrun, and `worker.main_handover` under the driver's.
"""

"""Starting a job: resolve the configuration, open the run directory, start the workers.

`driver.launch_job` does this on one machine and runs torchrun there (`torchrun_agent`); `worker.main` is what each rank
runs under the user's own torchrun, and `worker.main_handover` under the driver's. Both let `resolve_auto`
replace values that are set to auto by those of the existing run or of a measurement with `tune`; the rules are in
`goodput.auto_batch`.
"""

"""Runs as Slurm jobs.

`submit.submit_run` submits a run with the script that `job_script.render_sbatch_script` writes, and has what the script
calls on the nodes: the job's run directory, and whether a failed job is requeued. `queue` queries, cancels and signals
jobs; `claim` records which job a run directory belongs to; `rendezvous_service` serves the rendezvous of a pool whose
nodes join and leave.
"""

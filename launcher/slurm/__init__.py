"""Runs as Slurm jobs.

`submit.submit_run` submits a run with the script that `job_script.render_sbatch_script` writes. The script calls two
more functions of `submit`: they name the job's run directory and decide whether a failed job is requeued. `queue`
queries, cancels and signals jobs; `claim` records which job a run directory belongs to; `rendezvous_service` serves the
rendezvous of a pool whose nodes join and leave.
"""

"""Batch scripts, submission, requeueing and the state of Slurm jobs."""

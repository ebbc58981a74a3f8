"""Helpers of the tests: starting and ending real jobs, a Slurm cluster, a wandb server, run directories written by hand."""

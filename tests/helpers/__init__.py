"""Helpers of the tests: real jobs, a Slurm cluster, a wandb server, invented run directories and measurements."""

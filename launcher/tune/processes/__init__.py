"""The processes in which sizes are measured.

The driver starts `fork_server`, which forks a `probe_process` for every rank; under a torchrun of the user's own each
worker starts one (`sidecar`). `retries` starts all of them again after one ran out of memory in a collective.
"""

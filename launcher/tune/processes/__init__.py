"""The processes in which sizes are measured: forked or started ranks, retries after one runs out of memory."""

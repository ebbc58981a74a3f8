"""What the ranks of a job agree on and know about each other, and how its processes are started.

`rendezvous` connects the ranks, `RankStats` is what they tell each other in every update, `StopRequests` collects
requests to stop, `Watchdog` detects hung ranks, `StragglerDetector` and `LoadBalancer` follow the ranks' speeds.
`commands` has the torchrun command of a job, and `worker_env` the number of its workers and their environment.
"""

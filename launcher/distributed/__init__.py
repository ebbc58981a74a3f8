"""What the ranks of a job agree on and know about each other.

`rendezvous` connects the ranks, `StatsAllGather` is their only exchange per update, `StopRequests` collects requests
to stop, `Watchdog` detects hung ranks, `StragglerDetector` and `LoadBalancer` follow the ranks' speeds.
"""

"""Make property tests deterministic and without deadlines, so that a busy machine fails nothing."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "deterministic", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("deterministic")

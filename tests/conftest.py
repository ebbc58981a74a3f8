"""Property tests neither race a clock nor draw other examples in every run: a busy machine fails nothing."""

from hypothesis import HealthCheck, settings

settings.register_profile("house", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("house")

"""One profile for all property tests: a shared machine is slow at times, and examples leave no files behind."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "domain", max_examples=60, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("domain")

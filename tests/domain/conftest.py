"""One profile for all property tests: the same examples on every run, no time limit for each, no files left behind."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "domain",
    max_examples=60,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("domain")

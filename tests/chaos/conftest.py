"""Fixtures of the tests under faults: those of the worker's tests."""

from tests.worker.conftest import any_site, base, site

__all__ = ["any_site", "base", "site"]

"""DeepExtension's training methods: registry, executor, API and command."""

import gc

_USUAL = gc.get_threshold()
# What an import makes stays: 250,000 objects of the API. The collector looked at them hundreds of times, a seventh of
# what a start took.
gc.set_threshold(500_000, 20, 50)


def collect_as_usual() -> None:
    """Call it once a long-lived process has imported what it needs: that is not looked at any more."""
    gc.freeze()
    gc.set_threshold(*_USUAL)

"""DeepExtension's training methods: registry, executor, API and command."""

import gc

# What an import makes stays. By default the collector looks at all of it hundreds of times, which was a seventh of the
# start of a process; so it waits for as many new objects as a few hundred requests leave behind.
gc.set_threshold(50_000, 20, 50)

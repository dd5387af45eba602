"""One launch of a job's process: prepare, supervise, judge, finalize."""

"""The files of a run: folder, specification, log, events and curves."""

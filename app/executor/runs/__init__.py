"""What a run leaves behind: its folder, specification, log, events and curves."""

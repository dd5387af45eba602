"""What a stage says: its log, events, curves, streams."""

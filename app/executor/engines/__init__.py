"""What places, watches and ends attempts: this machine, later clusters."""

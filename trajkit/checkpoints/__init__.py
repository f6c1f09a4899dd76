"""Foreign checkpoint files in and out; one file per format."""

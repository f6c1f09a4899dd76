"""The command line of trajkit."""

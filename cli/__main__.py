"""`python -m trajkit_cli`, for when the command is not on the path."""

from .main import main

main(prog_name="trajkit")

"""What Ctrl-C makes the command say and return, in a file that imports nothing, as Ctrl-C may come at any time."""

PROGRAM = "wara-peft"
INTERRUPTED = "interrupted; nothing was written."
STATUS = 130
"""The exit status by which shells know a program that SIGINT ended: 128 and the signal's number."""

"""The message and exit status after Ctrl-C. This file imports nothing, as Ctrl-C may come during any import."""

PROGRAM = "wara-peft"
INTERRUPTED = "interrupted; nothing was written."
STATUS = 130
"""Shells expect this exit status of a program that SIGINT ended: 128 plus the signal's number, 2."""

"""The command line: parse, call one task, render."""

"""The command line: each command parses, builds a job, calls one operation and prints."""

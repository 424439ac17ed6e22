"""The commands, one to a module; each has a ``main(argv)`` that returns the exit code."""

"""The examples are programs that tests/test_examples.py runs; pytest must not import them for doctests."""

collect_ignore_glob = ["*.py"]

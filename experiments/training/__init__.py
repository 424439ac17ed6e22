"""The wing that makes runs."""

"""The wing that reads runs. Never trains."""

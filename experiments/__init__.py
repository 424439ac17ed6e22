"""clipbench: an experiment runner and benchmark suite for gradient clipping."""

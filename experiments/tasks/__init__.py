"""One task per file: data, model, loss, metrics and a target behind the contract in base.py."""

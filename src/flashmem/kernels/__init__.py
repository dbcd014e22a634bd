"""One folder per operation: `reference.py` defines it, `fused.py` is Triton, `__init__.py` checks and dispatches."""

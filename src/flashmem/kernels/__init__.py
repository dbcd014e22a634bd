"""One folder per operation: `reference.py` is the definition, `fused.py` is Triton, `__init__.py` checks and dispatches."""

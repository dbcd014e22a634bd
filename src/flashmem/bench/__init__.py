"""What `flashmem bench` measures: page swaps, decode steps, capacity, kernels. `report` says how results are told."""

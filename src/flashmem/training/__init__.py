"""Training: the small backbone (`backbone/`) and the Memory Indexer. Neither imports the other."""

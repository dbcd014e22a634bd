"""Training of Memory Indexers from shards (no backbone is ever loaded), and of the small backbone (`backbone`).

`config` what a user chooses, `data` documents as training reads them, `losses`, `loop` the run, `metrics` what an
indexer is worth at a budget, `calibration` the cut, `compare` the table of indexers and baselines.
"""

"""The small DeepSeek-V4 backbone that flashmem ships: its tokenizer, tasks, trainer, export and gates.

Nothing here imports modeling code: the forward pass is our own, over parameters with their stock names.
"""

"""flashmem: DeepSeek-V4 on ultra-long context with a fraction of the KV cache on the device."""

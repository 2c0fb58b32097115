"""The GPT: architecture, attention, loss, LoRA adapters, int8 weights, and the scaling rules of its depth."""

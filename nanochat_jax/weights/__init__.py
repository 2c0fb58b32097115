"""Weights and tokenizers in the formats of others, for `nanochat_jax.export` and `nanochat_jax.import`."""

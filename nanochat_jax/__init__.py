"""The whole of a small ChatGPT in JAX: model, optimizer, training, engine."""

__version__ = "0.1.0"

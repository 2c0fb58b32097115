"""The model over HTTP, and a page to chat with it: python -m server --run-dir runs/demo."""

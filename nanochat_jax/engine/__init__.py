"""Decoding: many requests at a time through a key/value cache, with tools, and conversations cut to fit."""

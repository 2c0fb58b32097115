"""Data: where documents come from, packing them into rows, and rows by step."""

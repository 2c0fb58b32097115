"""The optimizer, the train step and the loop around it, and how much memory a step takes."""

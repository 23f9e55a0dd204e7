"""The built-in tasks: real data that is at hand, and small networks for it."""

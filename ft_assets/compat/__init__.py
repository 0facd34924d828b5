"""Hooks into private, patched or replaced APIs of the libraries: one function for each hook.

Each module imports its library inside its functions. The tests in test_compat_*.py fail if a new
version of a library changes the shape of a hook.
"""

"""The scheme in training stacks, with one small module for each stack.

A module imports its stack, so import only the one that you use. None of the stacks is a dependency.
"""

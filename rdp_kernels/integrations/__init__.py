"""The scheme inside training stacks: a small module for each, which imports the stack and is itself imported on use."""

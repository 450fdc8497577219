"""The scheme in training stacks: one small module for each, which imports the stack. Import only the one you use."""

"""The block classes of timm, torchvision and transformers, each in a model so small that a check takes seconds."""

"""What training did to a network's paths: similarity, lesions, gradients, sizes. For any model with paths.

| file | does |
|---|---|
| `observe.py` | looks on at a model's paths, or stands in for them, and leaves the model as it was |
"""

"""The optimizers by name, with their learning rates.

To add an optimizer, write its rule in `kernels` and add a `Recipe` in `recipes`. Then
add its name to the help of `optimizer` in `options` and of `optimizers` in `compare`.
To add a rule for embedding and head, add an `EmbeddingRule` in `embeddings`.
"""

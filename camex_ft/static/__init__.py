"""Static merging: several checkpoints that were fine-tuned from one start become one dense checkpoint.

    specification --read--> start, donors, method, weights           merge_spec
    start, donors -> tensors under the same names, compared           merge_inputs
    texts         -> Fisher information or Gram matrices              merge_statistics
    tensors       -> merged tensor by tensor, streamed to a folder    merge, tensor_files, methods/
    coefficients  -> searched on a validation split                   coefficient_search

`camex_ft.merge` is `merge.merge`; ``camex-ft merge`` reads a specification.
"""

"""One run: the steps of the pipeline, its record, and inference on a finished run."""

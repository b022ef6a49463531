"""Tasks of the benchmarks: their columns, how an example becomes the model's rows, decisions, metrics, submissions.

sources.load(task, source=...)      hub | disk | embedded, validated      dict split -> Dataset with the hub's columns
task.rows(dataset, split)           what is scored, without a tokenizer   one row a candidate
task.encode(rows, split, ...)       input_ids, attention_mask, labels     padded a batch at a time by its `collator`
task.outputs(model, inputs, ...)    what is collected of the model        by encoded row
task.metrics(outputs, rows, ...)    {"accuracy": ...}, the primary one included
task.submission(...)                the file that the benchmark's site takes
"""

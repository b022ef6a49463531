"""Tasks of the benchmarks: columns, rows, model inputs, decisions, metrics and submissions.

data.sources.load(task, ...)        hub | disk | embedded, validated      dict split -> Dataset with the hub's columns
task.rows(dataset, split)           the rows to score, not tokenised      one for each candidate
task.encode(rows, split, ...)       input_ids, attention_mask, labels     padded a batch at a time by `collator`
task.outputs(model, inputs, ...)    the outputs to collect                by encoded row
task.metrics(outputs, rows, ...)    {"accuracy": ...}, the primary one included
task.submission(...)                the file for the benchmark's site

A kind of task is a subclass of `base.Task` with a model of its keys in YAML (`config_class`).
"""

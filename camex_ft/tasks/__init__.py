"""Tasks of the benchmarks: their columns, how an example becomes the model's rows, decisions, metrics, submissions.

sources.load(task, source=...)   hub | disk | embedded, validated      dict split -> Dataset with the hub's columns
task.rows(dataset, split)        text, text_pair, label, group, idx    one row a candidate
encode(rows, tokenizer, ...)     input_ids, attention_mask, labels     padded a batch at a time by `collator`
task.metrics(logits, rows)       {"accuracy": ...}, the primary one included
task.submission(...)             the file that the benchmark's site takes
"""

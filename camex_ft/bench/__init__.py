"""Benchmarks: a linear map with experts, a training step and decoding, each against its dense counterpart.

    settings -> sides (dense, merged, plain) -> alternating times, peak memory in a separate process -> record

`camex_ft.cli.bench` is ``camex-ft bench``; it starts without torch.
"""

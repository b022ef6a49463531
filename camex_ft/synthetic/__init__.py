"""Synthetic data and tiny backbones, which the package generates: minutes on a CPU, and no network.

``corpus("glue/sst2")`` -> the splits of a GLUE or SuperGLUE task with the benchmark's columns and a known
``domain`` a row; ``backbone("t5")`` -> a tiny model with random weights and its tokenizer. Their numbers
say nothing about the benchmarks.
"""

from camex_ft.synthetic.corpora import CORPORA, corpus
from camex_ft.synthetic.families import backbone
from camex_ft.synthetic.language import DOMAINS

__all__ = ["CORPORA", "DOMAINS", "backbone", "corpus"]

"""Citations: the paper whose method this is, and the package."""

from __future__ import annotations

CAMEX = """@inproceedings{nguyen2025camex,
  title     = {{CAMEx}: Curvature-aware Merging of Experts},
  author    = {Nguyen, Dung V. and Nguyen, Minh H. and Nguyen, Luc Q. and Teo, Rachel S.Y. and Nguyen, Tan M. and
               Tran, Linh Duy},
  booktitle = {International Conference on Learning Representations},
  year      = {2025},
  note      = {arXiv 2502.18821}
}"""
CAMEX_FT = """@software{camex_ft,
  title   = {camex_ft: fine-tuning with experts that are merged per input},
  version = {%s}
}"""


def citation(version: str) -> str:
    """Return both as BibTeX in a Markdown block, the package at a version."""
    return f"```bibtex\n{CAMEX}\n\n{CAMEX_FT % version}\n```"

"""Configuration: one YAML file, and overrides, to a `Config`, with everything that is wrong reported at once.

    load_config   reading (YAML, extends, overrides) -> validation (schema, rules) -> Config
    resolve       profiles (paper or embedded, and why) -> needs (what is not there) -> (Config, reason)
    config_hash   identity: the same experiment has the same hash
    summary, changes, notes                                                             remarks

Imports no torch: what needs it is imported when it is first asked for.
"""

from camex_ft.config.identity import config_hash, to_yaml
from camex_ft.config.problems import ConfigErrors, Problem
from camex_ft.config.profiles import load_config, resolve
from camex_ft.config.remarks import changes, changes_of, notes, summary
from camex_ft.config.schema import (
    Config,
    CurvatureConfig,
    DataConfig,
    MergingConfig,
    OutputConfig,
    RoutingConfig,
    TaskConfig,
    TrainingConfig,
    TuningConfig,
    UpcycleConfig,
)
from camex_ft.config.shipped import Shipped, copy_config, list_configs
from camex_ft.utils.system import Environment

__all__ = [
    "Config",
    "ConfigErrors",
    "CurvatureConfig",
    "DataConfig",
    "Environment",
    "MergingConfig",
    "OutputConfig",
    "Problem",
    "RoutingConfig",
    "Shipped",
    "TaskConfig",
    "TrainingConfig",
    "TuningConfig",
    "UpcycleConfig",
    "changes",
    "changes_of",
    "config_hash",
    "copy_config",
    "list_configs",
    "load_config",
    "notes",
    "resolve",
    "summary",
    "to_yaml",
]

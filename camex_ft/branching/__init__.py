"""Train branches of one start on their own data, merge them, and compare the result with dense training.

specification (YAML) -> start -> branches and baselines -> merged models -> scores on every source -> table, report

study          a specification and its mistakes
stages         its steps, each a configuration once the runs before it are done
execution      the steps in order, by the processes of `camex_ft.compare`
source_scores  evaluation of every row on the data of every branch, and on all together
verdict        the table, its tests, and the line that says which row is ahead
"""

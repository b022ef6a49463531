"""Compare protocols: the cells of a grid, which of them are done, running the missing ones, and the results.

specification (YAML) -> cells (a configuration each) -> done? -> run the rest -> entries -> tables, pictures, report

spec       a specification and its mistakes
cells      its cells: task, row, seed, and the configuration that they make
grid       which cells are done, running the others, and showing them meanwhile
running    processes, one a device, and their progress; `worker` is such a process or job
slurm      places where cells run: here, or as jobs, and what a job may ask for
outcome    records of cells; tables, pictures and the report
estimate   GPU hours and disk of the missing cells
"""

"""Compare protocols: the cells of a grid, what of them is done, running what is missing, and what comes of it.

specification (YAML) -> cells (a configuration each) -> done? -> run the rest -> entries -> tables, pictures, report

spec       what a specification may say, and what can be wrong with it
cells      its cells: task, row, seed, and the configuration that they make
survey     which of them are done, by this machine's data
running    processes, one a device, and what they tell; `worker` is such a process, `perform` what it does
places     where cells run: here, or as jobs
live       the table of cells while it goes
finished   the records of cells, wherever they lie
outcome    tables, pictures and the report, from the records
estimate   GPU hours and disk of what is missing
slurm      the same cells as an array of jobs; `job` is one, `slurm_parameters` what it may ask for
"""

"""Several processes of one run: the command that starts them, their end, and the report of a failure.

Nothing here imports torch or the configuration until it is asked: every process of the command line passes by.
"""

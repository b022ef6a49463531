"""The entry point of the console command ``camex-ft``, imported before the package.

`import camex_ft` registers upcycled models with transformers' auto classes, which takes the import of torch and
transformers. Where this module was imported first, it does not: the command line imports what each command needs, and
`camex_ft.upcycling.load` registers before it reads a model. ``python -m camex_ft`` goes the same way.
"""


def main() -> None:
    """Run the command line."""
    from camex_ft.cli import main as command_line

    command_line()

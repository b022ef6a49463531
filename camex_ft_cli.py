"""The entry point of the console command ``camex-ft``: ``python -m camex_ft_cli`` is the same.

`import camex_ft` registers upcycled models with transformers' auto classes, which takes the import of torch and
transformers. Where this module was imported first, it does not: the command line imports what each command needs, and
`camex_ft.upcycling.load` registers before it reads a model.
"""


def main() -> None:
    """Run the command line."""
    from camex_ft.cli import main as command_line

    command_line()


if __name__ == "__main__":
    from camex_ft_cli import main as registered_nothing  # under its own name, which `camex_ft` looks for

    registered_nothing()

"""``python -m camex_ft`` and ``accelerate launch -m camex_ft``: the command line."""

from camex_ft.cli import main

if __name__ == "__main__":
    main()

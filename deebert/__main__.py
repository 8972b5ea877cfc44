"""`python -m deebert` is the command `deebert`."""

from deebert.cli import main

if __name__ == "__main__":  # a process that a command starts imports this file, too
    main()

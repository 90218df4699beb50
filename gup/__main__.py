"""`python -m gup` is the command `gup`."""

from gup.cli import main

if __name__ == "__main__":
    main()

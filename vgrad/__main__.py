"""`python -m vgrad`: the same as the command `vgrad`."""

from vgrad.cli import main

if __name__ == "__main__":
    main()

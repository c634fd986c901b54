"""`python -m streamtools` is the `streamtools` command."""

from streamtools.cli import main

if __name__ == "__main__":
    main()

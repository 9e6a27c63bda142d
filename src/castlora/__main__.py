"""`python -m castlora` is the command `castlora`."""

from castlora.cli import main

if __name__ == "__main__":
    main()

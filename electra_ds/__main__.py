"""`python -m electra_ds VERB ...`, the same as `electra-ds VERB ...`."""

from electra_ds.cli import main

if __name__ == "__main__":
    main()

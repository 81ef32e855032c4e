"""`python -m lucid_compute` is `lucid`."""

from lucid_compute.cli.main import main

if __name__ == "__main__":
    main()

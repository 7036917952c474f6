"""`python -m sepconvert`."""

from sepconvert.cli.main import main

if __name__ == "__main__":
    main()

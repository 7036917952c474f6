"""`python -m sepconvert`."""

from sepconvert.cli import main

if __name__ == "__main__":
    main()

"""`python -m ttt_kernels info | demo | bench`."""

from ttt_kernels.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())

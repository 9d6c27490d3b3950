"""`python -m xlstm_ray`: the command line, where its script is not on the PATH."""

from xlstm_ray.cli.app import main

main()

"""`python -m liushui.cli`: the command where the script is not on the path."""

from liushui.cli.main import main

main()

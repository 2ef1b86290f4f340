"""Run the command line as a module, which is how `accelerate launch` starts it."""

from forgetcast.cli import main

main()

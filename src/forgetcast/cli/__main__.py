"""Run the command line as a module, which is how `accelerate launch` starts it."""

from forgetcast.__main__ import main

main()

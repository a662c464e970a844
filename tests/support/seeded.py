"""A program that rehearses a service once for each of its SEEDS, in one process: ``python seeded.py MODULE ARGUMENTS``."""

import os
import runpy
import sys

if __name__ == "__main__":
    module, *arguments = sys.argv[1:]
    for seed in os.environ["SEEDS"].split():
        sys.argv = [module, *arguments, "rehearse", "--json", "--seed", seed]
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            if end.code:
                raise

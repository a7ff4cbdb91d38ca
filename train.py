"""Command line of aq_lightning: ``python train.py --help``."""

from aq_lightning.cli import main

if __name__ == "__main__":
    main()

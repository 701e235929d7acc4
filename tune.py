"""Starts draftpick's command line from a checkout."""

from tuner.cli.app import main

if __name__ == "__main__":
    main()

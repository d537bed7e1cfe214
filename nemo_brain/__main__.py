"""``python -m nemo_brain COMMAND``: what ``nemo-brain COMMAND`` is, for torchrun's ``-m``."""

from nemo_brain.cli.main import main

if __name__ == "__main__":
    main()

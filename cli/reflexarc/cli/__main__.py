"""``python -m reflexarc.cli``, for launchers that start a module: ``torchrun -m``."""

from reflexarc.cli.main import main

main()

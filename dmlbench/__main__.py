"""``python -m dmlbench`` and ``torchrun -m dmlbench`` are the command ``dmlbench``."""

from dmlbench.cli import main

if __name__ == "__main__":
    main()

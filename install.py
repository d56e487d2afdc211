"""Run once by custom-node managers: check the versions, make the folder for calibration files. Nothing is
downloaded."""
import importlib.metadata
import sys
from pathlib import Path

FOLDER = "solver_calibrations"


def main() -> None:
    if sys.version_info < (3, 10):
        sys.exit(f"Lambda Solvers needs Python 3.10 or newer; this is {sys.version.split()[0]}.")
    for package in ("torch", "numpy", "safetensors", "einops", "torchsde"):
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            print(f"Lambda Solvers: {package} is not installed; ComfyUI's own requirements include it.")
    custom_nodes = Path(__file__).absolute().parent.parent
    if custom_nodes.name == "custom_nodes":
        folder = custom_nodes.parent / "models" / FOLDER
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as fault:  # it is tried again when something is saved
            print(f"Lambda Solvers: {folder} cannot be made: {fault}")


if __name__ == "__main__":
    main()

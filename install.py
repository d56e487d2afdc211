"""Run once by custom-node managers: check the versions, make the folder for calibration files. Nothing is downloaded."""
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
        (custom_nodes.parent / "models" / FOLDER).mkdir(parents=True, exist_ok=True)


if __name__ == "__main__":
    main()
